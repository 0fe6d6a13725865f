"""The file format of a canary in the registry.

    xxh3_64 of the rest, u64 | length u32 | facts (msgpack) | KV of the probe, or nothing

All numbers are little-endian. Generation and key are in the file's name; the key is the model's digest, except for a
canary of another than the default tenant, whose facts name tenant and model.
"""

import math
import struct
from dataclasses import asdict, fields, replace
from typing import Any

import msgpack  # type: ignore[import-untyped]
import xxhash

from kvstore_cluster.canaries.base import MAX_TEXT_BYTES, CanaryRecord, Origin
from kvstore_codec.bounded import unpack_fields
from kvstore_codec.canary import MAX_SKETCH_BYTES
from kvstore_codec.errors import CanaryError

_PREFIX = struct.Struct("<QI")
_MAX_FACTS_BYTES = 8192
MAX_DOCUMENT_BYTES = MAX_SKETCH_BYTES + _MAX_FACTS_BYTES + _PREFIX.size


def write_document(record: CanaryRecord, sketch: bytes) -> bytes:
    origin, client = asdict(bounded(record.origin)), _bounded_text(record.client)
    named = {"created": record.created_unix_s, "origin": origin, "client": client}
    if record.tenant:
        named |= {"tenant": record.tenant, "model": record.model_digest}
    facts: bytes = msgpack.packb(named)
    signed = struct.pack("<I", len(facts)) + facts + sketch
    return struct.pack("<Q", xxhash.xxh3_64_intdigest(signed)) + signed


def read_document(content: bytes, key: bytes, generation: int) -> tuple[CanaryRecord, bytes]:
    """Parses a document into its record and the KV of the probe. Raises CanaryError unless `content` is sound."""
    if not _PREFIX.size <= len(content) <= MAX_DOCUMENT_BYTES:
        raise CanaryError(f"{len(content)} bytes are not a canary of the registry")
    checksum, length = _PREFIX.unpack_from(content)
    if xxhash.xxh3_64_intdigest(memoryview(content)[8:]) != checksum:
        raise CanaryError("its checksum does not match")
    if length > min(_MAX_FACTS_BYTES, len(content) - _PREFIX.size):
        raise CanaryError(f"its facts cannot have {length} bytes")
    sketch = content[_PREFIX.size + length :]
    try:
        facts = unpack_fields(content[_PREFIX.size : _PREFIX.size + length])
        origin, created_unix_s = _origin(facts["origin"]), _finite(facts["created"])
        client = _bounded_text(str(facts.get("client", "")))  # absent in documents of earlier releases
        # A number would become as many zero bytes.
        tenant, model_digest = str(facts.get("tenant", "")), bytes(memoryview(facts.get("model", key)))
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, msgpack.UnpackException) as error:
        raise CanaryError(f"its facts cannot be read: {error!r}"[:300]) from error
    record = CanaryRecord(model_digest, generation, origin, created_unix_s, len(sketch), client, tenant)
    if record.key != key:
        raise CanaryError("it is the canary of another model or tenant")
    return record, sketch


def bounded(origin: Origin) -> Origin:
    """The origin with texts truncated to MAX_TEXT_BYTES, and a 32-bit pid."""
    texts = {
        field.name: _bounded_text(getattr(origin, field.name))
        for field in fields(Origin)
        if field.name != "pid"
    }
    return replace(origin, pid=origin.pid & 0xFFFFFFFF, **texts)


def _bounded_text(text: str) -> str:
    return text.encode()[:MAX_TEXT_BYTES].decode(errors="ignore")


def _finite(found: Any) -> float:
    number = float(found)
    if not math.isfinite(number):
        raise ValueError(f"{number} is not a time")
    return number


def _origin(found: Any) -> Origin:
    texts = ("model_id", "host", "software", "device", "dtype")
    return bounded(Origin(pid=int(found["pid"]), **{name: str(found[name]) for name in texts}))
