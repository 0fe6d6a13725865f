"""Canonical byte serialisation of the input of digests and ids.

A field is serialised as its length (u64 LE) followed by its bytes, so different field lists always give different
bytes. Integers are i64 LE. The first field is always a domain tag that names the hashed object and the version of
its layout. A change of a layout requires a new tag.
"""

from __future__ import annotations

import struct

from blake3 import blake3

from kvstore_codec.errors import InvalidKVError

DIGEST_BYTES = 32


def length_prefixed(*fields: bytes) -> bytes:
    """Joins `fields`, each preceded by its length as u64 LE."""
    return b"".join(struct.pack("<Q", len(field)) + field for field in fields)


def integer(value: int) -> bytes:
    return struct.pack("<q", value)


def digest(*fields: bytes) -> bytes:
    """blake3 (32 bytes) of `length_prefixed(*fields)`."""
    return blake3(length_prefixed(*fields)).digest()


def require_digest(name: str, value: bytes) -> None:
    """Raises InvalidKVError unless `value` is 32 bytes long."""
    if not isinstance(value, bytes) or len(value) != DIGEST_BYTES:
        raise InvalidKVError(f"{name} must be {DIGEST_BYTES} bytes, got {value!r}")
