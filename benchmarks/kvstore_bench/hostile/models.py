"""Parsers of what is kept for a model: calibrations, canaries, and key summaries."""

import functools
import json
import random
import struct
from collections.abc import Sequence

import msgpack  # type: ignore[import-untyped]
import torch
import xxhash

from kvstore_bench.fuzz.edits import edit_bytes
from kvstore_bench.hostile.parser import Parser, WrongResultError
from kvstore_bench.hostile.values import JSON, MSGPACK, mutated_document
from kvstore_client.contiguous.prefix_keys import PrefixKeys
from kvstore_client.contiguous.scoring import SummaryScorer
from kvstore_client.contiguous.summaries import ChunkSummary, SummaryShape
from kvstore_cluster.canaries.base import CanaryRecord, Origin
from kvstore_cluster.canaries.document import read_document, write_document
from kvstore_codec.calibration import Calibration, PeriodTransform
from kvstore_codec.canary.compare import ProbeKV, compare, read_probe_kv
from kvstore_codec.canary.probe import Probe, Sample
from kvstore_codec.errors import CalibrationError, CanaryError, InvalidKVError
from kvstore_codec.geometry import Geometry
from kvstore_codec.klt_frames import KLT
from kvstore_codec.model_spec import KVDtype, ModelSpec, RopeSpec

_SPEC = ModelSpec("synthetic", bytes(32), 3, 1, 8, KVDtype.BFLOAT16, RopeSpec("default", 1e4, 8))
_FEATURES = 6
_HEADER_LENGTH = struct.Struct("<Q")
_MOST_FACTS_BYTES = 200_000
_SHAPE = SummaryShape.of(Geometry(4, 2, 10, KVDtype.BFLOAT16, tokens=64, frame_tokens=32))
_SKETCH_PREFIX = struct.Struct("<4sHI")


def parsers() -> list[Parser]:
    return [
        Parser("calibration", _calibrations, _calibration_mutant, _read_calibration, (CalibrationError,)),
        Parser("canary-kv", _sketches, _sketch_mutant, _read_sketch, (CanaryError,)),
        Parser("canary-registry", _canaries, _canary_mutant, _read_canary, (CanaryError,)),
        Parser("key-summary", _summaries, _summary_mutant, _read_summary, (InvalidKVError,)),
    ]


@functools.cache
def _calibrations() -> Sequence[bytes]:
    return (_calibration(2).to_bytes(), _calibration(1).to_bytes())


def _calibration(period_layers: int) -> Calibration:
    generator = torch.Generator().manual_seed(5)
    periods = []
    for first in range(0, _SPEC.layers, period_layers):
        layers = min(period_layers, _SPEC.layers - first)
        size = layers * 2 * _SPEC.kv_heads * _SPEC.head_dim
        periods.append(
            PeriodTransform(
                torch.randn(size, generator=generator),
                torch.randn((_FEATURES, 2), generator=generator),
                torch.randn((2, size), generator=generator),
                torch.eye(_SPEC.head_dim).repeat(layers, 2, _SPEC.kv_heads, 1, 1),
                torch.linalg.qr(torch.randn((size, size), generator=generator))[0],
                torch.linspace(2, 1, size),
            )
        )
    steps = {"high": 0.25, "low": 1.0}
    errors = {rate: (0.1,) * len(periods) for rate in steps}
    return Calibration(_SPEC.digest, period_layers, 2, steps, errors, tuple(periods), {"text": "none"})


def _calibration_mutant(rng: random.Random) -> bytes:
    """Edits the facts, the header of the safetensors file, or its tensors. The length of the header is right."""
    data = rng.choice(_calibrations())
    (length,) = _HEADER_LENGTH.unpack_from(data)
    packed, tensors = data[8 : 8 + length], bytearray(data[8 + length :])
    header = json.loads(packed)
    match rng.randrange(4):
        case 0 | 1:
            facts = json.loads(header["__metadata__"]["kvstore"])
            edited = mutated_document(rng, JSON, facts, _MOST_FACTS_BYTES)
            header["__metadata__"]["kvstore"] = edited.decode(errors="replace")
            packed = json.dumps(header).encode()
        case 2:
            packed = mutated_document(rng, JSON, header, _MOST_FACTS_BYTES)
        case 3:
            for _ in range(rng.choice((1, 1, 3))):
                at = rng.randrange(len(tensors) // 4) * 4
                number = rng.choice((0.0, 1e-30, -1.0, 1e10, 3e38, float("inf"), float("nan")))
                tensors[at : at + 4] = struct.pack("<f", number)
            if rng.random() < 0.3:
                edit_bytes(rng, tensors)
    packed += b" " * (-len(packed) % 8)
    return _HEADER_LENGTH.pack(len(packed)) + packed + bytes(tensors)


def _read_calibration(data: bytes) -> None:
    klt = KLT(Calibration.from_bytes(data))
    if klt.calibration.features == _FEATURES:
        klt.predict(torch.ones((4, _FEATURES)))


@functools.cache
def _sketches() -> Sequence[bytes]:
    sample, generator = Sample.of(_SPEC), torch.Generator().manual_seed(3)
    shape = len(sample.layers), _SPEC.kv_heads, len(sample.tokens), _SPEC.head_dim
    keys, values = torch.randn((2, *shape), generator=generator).to(_SPEC.dtype.torch)
    return (ProbeKV(keys, values).to_bytes(_SPEC, Probe(1000, 2048)),)


def _sketch_mutant(rng: random.Random) -> bytes:
    data = _sketches()[0]
    magic, version, length = _SKETCH_PREFIX.unpack_from(data)
    packed = data[_SKETCH_PREFIX.size : _SKETCH_PREFIX.size + length]
    body = bytearray(data[_SKETCH_PREFIX.size + length : -8])
    if rng.random() < 0.6:
        packed = mutated_document(rng, MSGPACK, msgpack.unpackb(packed), 1024)
    else:
        for _ in range(rng.choice((1, 30))):
            at = rng.randrange(len(body) // 2) * 2
            body[at : at + 2] = rng.choice((b"\0\0", b"\x80\x49", b"\x80\x7f", b"\x7f\x49", b"\1\0"))
        if rng.random() < 0.2:
            edit_bytes(rng, body)
    length = len(packed) if rng.random() < 0.95 else rng.choice((0, 1, len(packed) + 1, 1024, 2**32 - 1))
    signed = _SKETCH_PREFIX.pack(magic, version, length) + packed + body
    return signed + struct.pack("<Q", xxhash.xxh3_64_intdigest(signed))


def _read_sketch(data: bytes) -> None:
    _, kept = read_probe_kv(data, _SPEC)
    own = read_probe_kv(_sketches()[0], _SPEC)[1]
    str(compare(own, kept, _SPEC))


@functools.cache
def _canaries() -> Sequence[bytes]:
    origin = Origin("model", "host", 17, "torch", "cpu", "bfloat16")
    record = CanaryRecord(_SPEC.digest, 1, origin, 1e9, len(_sketches()[0]), "client", "acme")
    return (write_document(record, _sketches()[0]), write_document(record, bytes(4 << 20)))


def _canary_mutant(rng: random.Random) -> bytes:
    content = _canaries()[0]
    (length,) = struct.unpack_from("<I", content, 8)
    facts, sketch = msgpack.unpackb(content[12 : 12 + length]), content[12 + length :]
    packed = mutated_document(rng, MSGPACK, facts, 8192)
    length = len(packed) if rng.random() < 0.95 else rng.choice((0, 1, len(packed) + 1, 8192, 2**32 - 1))
    return sealed_canary(packed, length, sketch)


def sealed_canary(packed: bytes, length: int, sketch: bytes) -> bytes:
    """The file of a canary with these encoded facts, and this number as their length."""
    signed = struct.pack("<I", length) + packed + sketch
    return struct.pack("<Q", xxhash.xxh3_64_intdigest(signed)) + signed


def _read_canary(content: bytes) -> None:
    key = CanaryRecord(_SPEC.digest, 1, tenant="acme").key
    record, sketch = read_document(content, key, 1)
    if read_document(write_document(record, sketch), key, 1) != (record, sketch):
        raise WrongResultError("a canary that differs when it is written and read again")


@functools.cache
def _summaries() -> Sequence[bytes]:
    generator = torch.Generator().manual_seed(2)
    keys = [
        torch.randn((_SHAPE.kv_heads, _SHAPE.tokens, _SHAPE.head_dim), generator=generator)
        for _ in _SHAPE.layers
    ]
    return (ChunkSummary.make(keys, _SHAPE).to_bytes(),)


def _summary_mutant(rng: random.Random) -> bytes:
    data = bytearray(_summaries()[0])
    for _ in range(rng.choice((1, 2, 40))):
        at = 4 * rng.randrange(_SHAPE.rows[-1] * 2)
        number = rng.choice((0.0, -1.0, 1e-40, 1e10, 1e30, 3e38, -3e38, float("inf"), float("nan")))
        data[at : at + 4] = struct.pack("<f", number)
    if rng.random() < 0.5:
        edit_bytes(rng, data)
    return bytes(data)


def _read_summary(data: bytes) -> None:
    summary = ChunkSummary.from_bytes(data, _SHAPE)
    queries = torch.ones((_SHAPE.kv_heads * 2, 3, _SHAPE.head_dim))
    scores = SummaryScorer(PrefixKeys([summary], _SHAPE), 32)(_SHAPE.layers[0], queries, 0.1)
    if not bool(scores.rank.isfinite().all()):
        raise WrongResultError("frames whose scores are not numbers")
