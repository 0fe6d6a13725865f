"""Synthetic KV, and chunks made of it."""

from __future__ import annotations

import functools
from typing import Any

import torch

from kvstore_codec.calibration import Calibration, PeriodTransform
from kvstore_codec.chunk import ChunkHeader
from kvstore_codec.codec import EncodedChunk, decode_frames, encode_chunk
from kvstore_codec.coders import availability
from kvstore_codec.encoding import Encoding
from kvstore_codec.identity import ChunkId, ContentId, PrefixId
from kvstore_codec.klt_frames import KLT
from kvstore_codec.model_spec import KVDtype, ModelSpec, RopeSpec

CHUNK_ID = ChunkId(ContentId(bytes(range(32))), PrefixId(bytes(range(32, 64))))
ALL_ENCODINGS = [e for e in map(Encoding.parse, Encoding.names()) if availability(e.coder) is None]
WORD_DTYPES = {2: torch.int16, 4: torch.int32}


def make_spec(
    layers: int = 5, kv_heads: int = 2, head_dim: int = 32, dtype: KVDtype = KVDtype.BFLOAT16
) -> ModelSpec:
    rope = RopeSpec("default", 10000.0, head_dim)
    return ModelSpec("synthetic", bytes(32), layers, kv_heads, head_dim, dtype, rope)


def make_kv(spec: ModelSpec, tokens: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Noise around a mean of its own for each channel, as real KV has it: two tensors
    [layers, kv_heads, tokens, head_dim]."""
    generator = torch.Generator().manual_seed(seed)
    channels = (2, spec.layers, spec.kv_heads, 1, spec.head_dim)
    means = 3 * torch.randn(channels, generator=generator)
    spread = 0.5 + torch.rand(channels, generator=generator)
    noise = torch.randn((*channels[:3], tokens, spec.head_dim), generator=generator)
    keys, values = (means + spread * noise).to(spec.dtype.torch)
    return keys, values


STEPS = {"high": 0.25, "medium": 0.5, "low": 1.0}
FEATURES = 6


def make_calibration(
    spec: ModelSpec, period_layers: int = 4, columns: int | None = None, rank: int = 3
) -> Calibration:
    """Maps as a calibration has them, though of no text in particular."""
    generator = torch.Generator().manual_seed(7)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    periods = []
    for first in range(0, spec.layers, period_layers):
        layers = min(period_layers, spec.layers - first)
        size = layers * 2 * spec.kv_heads * spec.head_dim
        root = randn(layers, 2, spec.kv_heads, spec.head_dim, spec.head_dim) / spec.head_dim
        basis = torch.linalg.qr(randn(size, size))[0][:, :columns]
        periods.append(
            PeriodTransform(
                mean=randn(size),
                predictor_in=randn(FEATURES, rank),
                predictor_out=randn(rank, size),
                whitening=root @ root.mT + torch.eye(spec.head_dim),
                basis=basis,
                variances=torch.linspace(2, 1, basis.shape[1]),
            )
        )
    errors = {rate: (step**2 / 12,) * len(periods) for rate, step in STEPS.items()}
    return Calibration(spec.digest, period_layers, 4, STEPS, errors, tuple(periods), {"text": "none"})


@functools.cache
def klt_of(spec: ModelSpec) -> KLT:
    return KLT(make_calibration(spec))


def features_of(tokens: int) -> torch.Tensor:
    return torch.randn((tokens, FEATURES), generator=torch.Generator().manual_seed(11))


def encode(
    spec: ModelSpec, kv: tuple[torch.Tensor, torch.Tensor], encoding: Encoding, sinks: int = 0
) -> EncodedChunk:
    klt, features = (
        (klt_of(spec), features_of(kv[0].shape[2])) if encoding.needs_calibration else (None, None)
    )
    return encode_chunk(
        *kv, spec=spec, chunk_id=CHUNK_ID, encoding=encoding, klt=klt, features=features, sinks=sinks
    )


def decoder_of(header: ChunkHeader, klt: KLT | None = None) -> dict[str, Any]:
    """What `decode_frames` needs besides the bytes. `klt` is by default that of this machine's `make_calibration`."""
    if not header.encoding.needs_calibration:
        return {}
    geometry = header.geometry
    spec = make_spec(geometry.layers, geometry.kv_heads, geometry.head_dim, geometry.dtype)
    klt = klt or klt_of(spec)
    return {"klt": klt, "prediction": klt.predict(features_of(geometry.tokens))}


def decode(chunk: EncodedChunk, klt: KLT | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Decodes every frame into a slice of larger tensors, as an engine's cache would have it."""
    geometry = chunk.header.geometry
    room = (geometry.layers, geometry.kv_heads, geometry.tokens + 7, geometry.head_dim)
    outs = [torch.full(room, -1.0, dtype=geometry.dtype.torch) for _ in range(2)]
    for frame, data in enumerate(chunk.parts[1:]):
        period, slot = divmod(frame, geometry.frames_per_period)
        layers, tokens = geometry.layers_of(period), geometry.tokens_of(slot)
        views = [out[layers.start : layers.stop, :, 3 + tokens.start : 3 + tokens.stop] for out in outs]
        decode_frames(chunk.header, frame, 1, data, *views, **decoder_of(chunk.header, klt))
    for out in outs:
        assert (out[:, :, :3] == -1).all(), "wrote in front of the frames"
        assert (out[:, :, 3 + geometry.tokens :] == -1).all(), "wrote behind the frames"
    keys, values = (out[:, :, 3 : 3 + geometry.tokens] for out in outs)
    return keys, values


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The float bits as integers: tells -0.0 from 0.0 and one NaN from another."""
    return tensor.view(WORD_DTYPES[tensor.dtype.itemsize])


def same_bits(left: tuple[torch.Tensor, torch.Tensor], right: tuple[torch.Tensor, torch.Tensor]) -> bool:
    return all(torch.equal(bits(a), bits(b)) for a, b in zip(left, right, strict=True))
