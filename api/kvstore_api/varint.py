"""Varints of protocol buffers, for messages that are written by hand."""

from functools import lru_cache

_VALUES_KEPT = 4096


@lru_cache(_VALUES_KEPT)
def varint(value: int) -> bytes:
    """Encodes a number >= 0."""
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)
