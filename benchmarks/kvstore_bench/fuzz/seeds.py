"""Makes the seeds: valid chunks that mutants are made from. They cover every kind of encoding that this machine can
decode, for two tenants, and are as small as the decoders allow."""

import functools
from dataclasses import dataclass
from typing import Any

import torch

from kvstore_codec.calibration import Calibration, PeriodTransform
from kvstore_codec.chunk import ChunkHeader
from kvstore_codec.codec import encode_chunk
from kvstore_codec.coders import availability
from kvstore_codec.encoding import Encoding
from kvstore_codec.identity import ChunkId, ContentId, PrefixId
from kvstore_codec.klt_frames import KLT, Prediction
from kvstore_codec.model_spec import KVDtype, ModelSpec, RopeSpec
from kvstore_codec.token_order import TokenOrder

TENANTS = 2
_LAYERS, _HEADS = 2, 1
_FEATURES, _RANK = 4, 2
_STEPS = {"high": 0.25, "medium": 0.5, "low": 1.0}


@dataclass(frozen=True, slots=True)
class _Shape:
    tokens: int
    head_dim: int


_SMALL = _Shape(tokens=20, head_dim=16)
# Fills most of the smallest picture, 144 x 144 samples, so that little of the damage hits padding.
_FULL = _Shape(tokens=64, head_dim=64)

# Chunks with 16 tokens per frame have two frames, so that frames can be swapped. Video encodings come last.
_CHUNKS = (
    *(("exact-raw@20", _SMALL, dtype) for dtype in (KVDtype.BFLOAT16, KVDtype.FLOAT32)),
    *(("exact-zstd@16", _SMALL, dtype) for dtype in (KVDtype.BFLOAT16, KVDtype.FLOAT32)),
    ("high-raw@20", _SMALL, KVDtype.BFLOAT16),
    ("high-zstd@20", _SMALL, KVDtype.BFLOAT16),
    ("medium-zstd@20", _SMALL, KVDtype.FLOAT16),
    ("low-zstd@16", _SMALL, KVDtype.BFLOAT16),
    ("step2.0-zstd@20", _SMALL, KVDtype.BFLOAT16),
    ("high-klt-pco@20", _SMALL, KVDtype.BFLOAT16),
    ("medium-klt-pco@16", _SMALL, KVDtype.BFLOAT16),
    ("low-klt-pco@20", _SMALL, KVDtype.FLOAT32),
    ("medium-klt-zstd@20", _SMALL, KVDtype.BFLOAT16),
    ("low-klt-raw@20", _SMALL, KVDtype.BFLOAT16),
    ("low-hevc-cpu@20", _SMALL, KVDtype.BFLOAT16),
    ("low-klt-hevc-cpu@20", _SMALL, KVDtype.BFLOAT16),
    ("low-hevc-cpu", _FULL, KVDtype.BFLOAT16),
    ("step8.0-klt-hevc-cpu", _FULL, KVDtype.BFLOAT16),
    ("step8.0-klt-hevc-cpu-420", _FULL, KVDtype.BFLOAT16),
)


@dataclass(frozen=True, slots=True)
class Seed:
    """A valid chunk of one tenant. Chunks of the same `name` differ only in tenant, chunk ID and KV."""

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
    """All seeds. Those of the same name are neighbours."""
    return tuple(
        _seed(Encoding.parse(name), shape, dtype, tenant)
        for name, shape, dtype in _CHUNKS
        if availability(Encoding.parse(name).coder) is None
        for tenant in range(TENANTS)
    )


def decoder_of(header: ChunkHeader) -> dict[str, Any]:
    """Arguments of `decode_frames` for the calibration that the header names. Empty for an unknown calibration."""
    return _decoders().get(header.calibration, {})


@functools.cache
def _decoders() -> dict[bytes | None, dict[str, Any]]:
    """Arguments of `decode_frames`, by digest of the calibration."""
    known = {(shape, dtype): _klt(shape, dtype) for _, shape, dtype in _CHUNKS}
    return {
        klt.calibration.digest: {"klt": klt, "prediction": _prediction(klt, shape)}
        for (shape, _), klt in known.items()
    }


@functools.cache
def _klt(shape: _Shape, dtype: KVDtype) -> KLT:
    """A calibration with random matrices."""
    spec, generator = _spec(shape, dtype), torch.Generator().manual_seed(7)
    size = _LAYERS * 2 * _HEADS * shape.head_dim

    def randn(*sizes: int) -> torch.Tensor:
        return torch.randn(sizes, generator=generator)

    root = randn(_LAYERS, 2, _HEADS, shape.head_dim, shape.head_dim) / shape.head_dim
    period = PeriodTransform(
        mean=randn(size),
        predictor_in=randn(_FEATURES, _RANK),
        predictor_out=randn(_RANK, size),
        whitening=root @ root.mT + torch.eye(shape.head_dim),
        basis=torch.linalg.qr(randn(size, size))[0],
        variances=torch.linspace(2, 1, size),
    )
    errors = {rate: (step**2 / 12,) for rate, step in _STEPS.items()}
    return KLT(Calibration(spec.digest, _LAYERS, _FEATURES, _STEPS, errors, (period,), {"text": "none"}))


def _prediction(klt: KLT, shape: _Shape) -> Prediction:
    return klt.predict(_features(shape))


def _features(shape: _Shape) -> torch.Tensor:
    return torch.randn((shape.tokens, _FEATURES), generator=torch.Generator().manual_seed(11))


def _spec(shape: _Shape, dtype: KVDtype) -> ModelSpec:
    rope = RopeSpec("default", 10000.0, shape.head_dim)
    return ModelSpec("synthetic", bytes(32), _LAYERS, _HEADS, shape.head_dim, dtype, rope)


def _seed(encoding: Encoding, shape: _Shape, dtype: KVDtype, tenant: int) -> Seed:
    generator = torch.Generator().manual_seed(tenant)
    means = 3 * torch.randn((2, _LAYERS, _HEADS, 1, shape.head_dim), generator=generator)
    noise = torch.randn((2, _LAYERS, _HEADS, shape.tokens, shape.head_dim), generator=generator)
    keys, values = (means + noise).to(dtype.torch)
    klt = _klt(shape, dtype) if encoding.needs_calibration else None
    chunk = encode_chunk(
        keys,
        values,
        spec=_spec(shape, dtype),
        chunk_id=ChunkId(ContentId(bytes([tenant]) * 32), PrefixId(bytes([128 + tenant]) * 32)),
        encoding=encoding,
        klt=klt,
        features=_features(shape) if klt else None,
        sinks=2,
        token_order=TokenOrder((3, 1, 2), (0, 5)) if encoding.name.startswith("exact-zstd") else None,
    )
    name = f"{encoding.name} {dtype}"
    return Seed(name, tenant, chunk.header, chunk.parts[0], tuple(chunk.parts[1:]))
