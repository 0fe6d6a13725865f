"""Byte format of the KV of a canary (a sketch).

    magic "KVK\\0" | version u16 | header length u32 | header (msgpack) | keys | values | xxh3_64 of all that, u64

All numbers are little-endian. Keys (before RoPE) and values are `[layers, kv_heads, tokens, head_dim]`, as in a chunk.
A reader checks every length against the available bytes before it uses it. This module does not import torch, because
the coordinator also checks sketches.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from typing import Any

import msgpack  # type: ignore[import-untyped]
import numpy as np
import xxhash

from kvstore_codec.bounded import unpack_fields
from kvstore_codec.canary.probe import Probe
from kvstore_codec.canonical import require_digest
from kvstore_codec.errors import CanaryError, CodecError
from kvstore_codec.model_spec import KVDtype

VERSION = 1
MAX_SKETCH_BYTES = (4 << 20) + 4096
"""Small enough for one gRPC message of the service."""

_MAGIC = b"KVK\0"
_PREFIX = struct.Struct("<4sHI")
_CHECKSUM = struct.Struct("<Q")
_MAX_HEADER_BYTES = 1024
_MAX_DIMENSION = 1 << 20
_LARGEST = {KVDtype.FLOAT32: 147 << 23, KVDtype.BFLOAT16: 147 << 7, KVDtype.FLOAT16: 0x7BFF}
"""Bits of the largest allowed magnitude: 2^20, in float16 its largest number. KV is the product of normed values, and
biases reach some hundreds."""


@dataclass(frozen=True, slots=True)
class SketchHeader:
    """Header of a sketch. `shape` is the shape of its keys and of its values."""

    model_digest: bytes
    probe: Probe
    dtype: KVDtype
    shape: tuple[int, int, int, int]

    @property
    def body_bytes(self) -> int:
        """Size of keys and values together, in bytes."""
        return 2 * math.prod(self.shape) * self.dtype.itemsize


def write_sketch(header: SketchHeader, body: bytes) -> bytes:
    """Serialises a sketch. `body` holds keys, then values. Raises CanaryError for another or a too large size."""
    fields = {
        "model": header.model_digest,
        "vocabulary": header.probe.vocabulary,
        "length": header.probe.length,
        "dtype": header.dtype.value,
        "shape": list(header.shape),
    }
    packed: bytes = msgpack.packb(fields)
    signed = _PREFIX.pack(_MAGIC, VERSION, len(packed)) + packed + body
    data = signed + _CHECKSUM.pack(xxhash.xxh3_64_intdigest(signed))
    if len(body) != header.body_bytes or len(data) > MAX_SKETCH_BYTES:
        raise CanaryError(f"{len(body)} bytes of KV are not a sketch of {header.shape} {header.dtype}")
    _require_plausible(body, header.dtype)
    return data


def read_sketch_header(data: bytes) -> SketchHeader:
    """Verifies all of `data` and returns its header. Raises CanaryError if it is not a whole sketch."""
    return read_sketch(data)[0]


def read_sketch(data: bytes) -> tuple[SketchHeader, memoryview]:
    """The header, and a view of keys and values. Raises CanaryError if `data` is not a whole sketch."""
    view = memoryview(data)
    if not _PREFIX.size + _CHECKSUM.size <= len(view) <= MAX_SKETCH_BYTES:
        raise CanaryError(f"{len(view)} bytes are not the KV of a probe; at most {MAX_SKETCH_BYTES} are")
    magic, version, length = _PREFIX.unpack_from(view)
    if magic != _MAGIC:
        raise CanaryError(f"these bytes are not the KV of a probe: they begin with {magic.hex()}")
    if version != VERSION:
        raise CanaryError(f"the canary has version {version}, this release reads version {VERSION}")
    if length > _MAX_HEADER_BYTES or _PREFIX.size + length + _CHECKSUM.size > len(view):
        raise CanaryError(f"a canary's header of {length} bytes is longer than it may be")
    signed = view[: -_CHECKSUM.size]
    (stored,) = _CHECKSUM.unpack_from(view, len(signed))
    if xxhash.xxh3_64_intdigest(signed) != stored:
        raise CanaryError("the canary was damaged: its checksum does not match")
    body = signed[_PREFIX.size + length :]
    try:
        header = _parse(unpack_fields(signed[_PREFIX.size : _PREFIX.size + length]))
    except CanaryError:
        raise
    except (CodecError, ValueError, KeyError, TypeError, msgpack.UnpackException) as error:
        raise CanaryError(f"the canary's header cannot be read: {error!r}"[:300]) from error
    if len(body) != header.body_bytes:
        raise CanaryError(f"a canary of {header.shape} {header.dtype} does not have {len(body)} bytes of KV")
    _require_plausible(body, header.dtype)
    return header, body


def _require_plausible(body: bytes | memoryview, dtype: KVDtype) -> None:
    """Raises CanaryError for NaN, infinity and numbers too large for KV. Without the sign bit, floats have the same
    order as the integers of the same bits."""
    bits = np.frombuffer(body, f"<u{dtype.itemsize}")
    magnitudes = bits & bits.dtype.type((1 << (8 * dtype.itemsize - 1)) - 1)
    if magnitudes.max() > _LARGEST[dtype]:
        raise CanaryError(
            "a canary contains NaN, infinity or numbers beyond 2^20, which no model computes as KV"
        )


def _parse(fields: Any) -> SketchHeader:
    require_digest("the model digest", fields["model"])
    shape = tuple(fields["shape"])
    if len(shape) != 4 or not all(type(size) is int and 1 <= size <= _MAX_DIMENSION for size in shape):
        raise CanaryError(
            f"a canary's KV must have four dimensions of 1 to {_MAX_DIMENSION}, not {str(shape)[:100]}"
        )
    probe = Probe(fields["vocabulary"], fields["length"])
    return SketchHeader(fields["model"], probe, KVDtype(fields["dtype"]), shape)
