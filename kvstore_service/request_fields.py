"""Counts the fields of a request before it is parsed. A parsed message of millions of empty fields takes 20 times its
size."""

from kvstore_codec.errors import MalformedRequestError

_FEW_BYTES = 1 << 20
"""Requests of at most this size are parsed without counting their fields."""
MAX_FIELDS = (1 << 17) + (1 << 18)
"""Chunks, encodings and ranges of the largest allowed read."""
_VARINT, _LENGTH_DELIMITED, _FIXED32 = 0, 2, 5


def require_few_fields(data: bytes | bytearray, name: str) -> None:
    """Raises MalformedRequestError for a message with more than MAX_FIELDS fields, or with field numbers or types that
    no request of the API has. `name` is the expected message type. Nested fields are not counted, because none of them
    repeats."""
    if len(data) <= _FEW_BYTES:
        return
    at = count = 0
    while at < len(data):
        count += 1
        if count > MAX_FIELDS:
            raise MalformedRequestError(
                f"more than {MAX_FIELDS} fields in one request; send smaller requests"
            )
        tag, at = data[at], at + 1
        kind = tag & 7
        if tag >= 0x80 or kind not in (_VARINT, _LENGTH_DELIMITED, _FIXED32):
            raise MalformedRequestError(f"not a {name}")
        if kind == _FIXED32:
            at += 4
            continue
        value = shift = 0
        while at < len(data):
            byte, at = data[at], at + 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                break
        if kind == _LENGTH_DELIMITED:
            at += value
