"""The chunks that mutants are made of: every encoding that runs here, of two tenants, as small as decoders allow."""

import functools
from dataclasses import dataclass
from typing import Any

import torch

from kvstore_codec.calibration import Calibration, PeriodTransform
from kvstore_codec.chunk import ChunkHeader
from kvstore_codec.codec import EncodedChunk, encode_chunk
from kvstore_codec.coders import availability
from kvstore_codec.encoding import Encoding
from kvstore_codec.identity import ChunkId, ContentId, PrefixId
from kvstore_codec.klt_frames import KLT
from kvstore_codec.model_spec import KVDtype, ModelSpec, RopeSpec
from kvstore_codec.token_order import TokenOrder

TOKENS = 20
TENANTS = 2
_LAYERS, _HEADS, _HEAD_DIM = 2, 1, 16
_FEATURES, _RANK = 4, 2
_STEPS = {"high": 0.25, "medium": 0.5, "low": 1.0}
# Those with fewer tokens a frame have two frames, which can change places. The video comes last.
_NAMES = (
    "exact-raw@20",
    "exact-zstd@16",
    "high-raw@20",
    "high-zstd@20",
    "medium-zstd@20",
    "low-zstd@16",
    "step2.0-zstd@20",
    "high-klt-pco@20",
    "medium-klt-pco@16",
    "low-klt-pco@20",
    "medium-klt-zstd@20",
    "low-klt-raw@20",
    "low-hevc-cpu@20",
    "low-klt-hevc-cpu@20",
    "low-klt-hevc-cpu-420@20",
)


@dataclass(frozen=True, slots=True)
class Seed:
    """A sound chunk of one tenant. The seeds of one place in the list of another tenant differ in name and KV only."""

    name: str
    tenant: int
    header: ChunkHeader
    header_data: bytes
    frames: tuple[bytes, ...]

    @property
    def data(self) -> bytes:
        return b"".join((self.header_data, *self.frames))


@functools.cache
def seeds() -> tuple[Seed, ...]:
    """In order of their names, the tenants of one name side by side."""
    encodings = [encoding for encoding in map(Encoding.parse, _NAMES) if availability(encoding.coder) is None]
    found = [
        _seed(encoding, dtype, tenant)
        for encoding in encodings
        for dtype in (KVDtype.BFLOAT16, KVDtype.FLOAT32)
        if dtype is KVDtype.BFLOAT16 or encoding.name.startswith("exact")
        for tenant in range(TENANTS)
    ]
    return tuple(found)


def decoder_of(header: ChunkHeader) -> dict[str, Any]:
    """The calibration and prediction that a client has for chunks of the seeds' model."""
    klt = klt_of(header.geometry.dtype)
    return {"klt": klt, "prediction": _prediction(header.geometry.dtype)}


@functools.cache
def klt_of(dtype: KVDtype) -> KLT:
    """Maps as a calibration has them, of no text in particular."""
    spec, generator = _spec(dtype), torch.Generator().manual_seed(7)
    size = _LAYERS * 2 * _HEADS * _HEAD_DIM

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    root = randn(_LAYERS, 2, _HEADS, _HEAD_DIM, _HEAD_DIM) / _HEAD_DIM
    period = PeriodTransform(
        mean=randn(size),
        predictor_in=randn(_FEATURES, _RANK),
        predictor_out=randn(_RANK, size),
        whitening=root @ root.mT + torch.eye(_HEAD_DIM),
        basis=torch.linalg.qr(randn(size, size))[0],
        variances=torch.linspace(2, 1, size),
    )
    errors = {rate: (step**2 / 12,) for rate, step in _STEPS.items()}
    return KLT(Calibration(spec.digest, _LAYERS, _FEATURES, _STEPS, errors, (period,), {"text": "none"}))


@functools.cache
def _prediction(dtype: KVDtype) -> Any:
    return klt_of(dtype).predict(_features())


def _features() -> torch.Tensor:
    return torch.randn((TOKENS, _FEATURES), generator=torch.Generator().manual_seed(11))


def _spec(dtype: KVDtype) -> ModelSpec:
    rope = RopeSpec("default", 10000.0, _HEAD_DIM)
    return ModelSpec("synthetic", bytes(32), _LAYERS, _HEADS, _HEAD_DIM, dtype, rope)


def _seed(encoding: Encoding, dtype: KVDtype, tenant: int) -> Seed:
    spec, generator = _spec(dtype), torch.Generator().manual_seed(tenant)
    shape = 2, _LAYERS, _HEADS, TOKENS, _HEAD_DIM
    means = 3 * torch.randn((2, _LAYERS, _HEADS, 1, _HEAD_DIM), generator=generator)
    keys, values = (means + torch.randn(shape, generator=generator)).to(dtype.torch)
    klt = klt_of(dtype) if encoding.needs_calibration else None
    chunk: EncodedChunk = encode_chunk(
        keys,
        values,
        spec=spec,
        chunk_id=ChunkId(ContentId(bytes([tenant]) * 32), PrefixId(bytes([128 + tenant]) * 32)),
        encoding=encoding,
        klt=klt,
        features=_features() if klt else None,
        sinks=2,
        token_order=TokenOrder((3, 1, 2), (0, 5)) if encoding.name.startswith("exact-zstd") else None,
    )
    name = f"{encoding.name} {dtype}"
    return Seed(name, tenant, chunk.header, chunk.parts[0], tuple(chunk.parts[1:]))
