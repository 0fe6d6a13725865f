"""The one byte serialisation that digests and ids are computed over.

A field is its length (u64 LE) followed by its bytes, so no two different field lists give the same bytes.
Integers are decimal-free: i64 LE. The first field is always a domain tag that names what is hashed and the
version of its layout; changing a layout means changing its tag.
"""

from __future__ import annotations

import struct

from blake3 import blake3

from kvstore_codec.errors import InvalidKVError

DIGEST_BYTES = 32


def length_prefixed(*fields: bytes) -> bytes:
    """Joins `fields`, each behind its length as u64 LE."""
    return b"".join(struct.pack("<Q", len(field)) + field for field in fields)


def integer(value: int) -> bytes:
    return struct.pack("<q", value)


def digest(*fields: bytes) -> bytes:
    """blake3 (32 bytes) over `length_prefixed(*fields)`."""
    return blake3(length_prefixed(*fields)).digest()


def require_digest(name: str, value: bytes) -> None:
    """Raises InvalidKVError unless `value` is 32 bytes long."""
    if not isinstance(value, bytes) or len(value) != DIGEST_BYTES:
        raise InvalidKVError(f"{name} must be {DIGEST_BYTES} bytes, got {value!r}")
