"""Hand-written encoding and decoding of the two messages that carry KV bytes.

The bytes on the wire equal those of the generated classes, without their copies: a message is joined once from
memoryviews, and its payload is a view of the received message. Over loopback in 1 MiB pieces this reads a fifth
faster than the generated code (1.5 instead of 1.25 GB/s), and a put makes half as many copies.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from google.protobuf.message import DecodeError

from kvstore_api.frames import MAX_PUT_START_BYTES
from kvstore_api.v1.kvstore_pb2 import PutRequest, ReadReply, ReadStatus
from kvstore_api.varint import varint

# Protocol buffer tags: field number << 3 | wire type (0 varint, 2 length-delimited).
_READ_RANGE = 1 << 3
_READ_DATA = 2 << 3 | 2
_PUT_DATA = 2 << 3 | 2


@dataclass(frozen=True, slots=True)
class ReadPiece:
    """A ReadReply without a copy of its data. `data` is a view that keeps the whole message alive."""

    range: int
    data: memoryview
    status: ReadStatus = ReadStatus.READ_STATUS_OK


def encode_read_piece(range_index: int, views: Sequence[memoryview]) -> bytes:
    """Encodes a ReadReply with status OK and the joined bytes of `views`."""
    length = sum(view.nbytes for view in views)
    start = bytes([_READ_RANGE]) + varint(range_index) if range_index else b""
    return b"".join([start, bytes([_READ_DATA]), varint(length), *views])


def decode_read_reply(message: bytes) -> ReadPiece:
    """Decodes any ReadReply. Raises google.protobuf.message.DecodeError for other bytes."""
    start, range_index = 0, 0
    if message[:1] == bytes([_READ_RANGE]):
        range_index, start = _read_varint(message, 1)
    data = _whole_field(message, start, _READ_DATA)
    if data is not None:
        return ReadPiece(range_index & 0xFFFFFFFF, data)  # a uint32, even if its varint is longer
    reply = ReadReply.FromString(message)
    return ReadPiece(reply.range, memoryview(reply.data), reply.status)


def encode_put_request(step: PutRequest | memoryview) -> bytes:
    """Encodes a step of a put. A memoryview is a step with these bytes as its `data`."""
    if isinstance(step, memoryview):
        return b"".join([bytes([_PUT_DATA]), varint(step.nbytes), step])
    message: bytes = step.SerializeToString()
    return message


def decode_put_request(message: bytes) -> PutRequest | memoryview:
    """Inverse of `encode_put_request`. Raises google.protobuf.message.DecodeError for other bytes, and for a step other
    than data of more than MAX_PUT_START_BYTES: parsed empty fields take 20 times the memory of their bytes."""
    data = _whole_field(message, 0, _PUT_DATA)
    if data is not None:
        return data
    if len(message) > MAX_PUT_START_BYTES:
        raise DecodeError(
            f"a step other than data has at most {MAX_PUT_START_BYTES} bytes, not {len(message)}"
        )
    return PutRequest.FromString(message)


def _whole_field(message: bytes, start: int, tag: int) -> memoryview | None:
    """The payload of field `tag` if `message` from `start` on is exactly that field; otherwise None."""
    if message[start : start + 1] != bytes([tag]):
        return None
    length, start = _read_varint(message, start + 1)
    return memoryview(message)[start:] if start + length == len(message) else None


def _read_varint(message: bytes, position: int) -> tuple[int, int]:
    """(value, position after it). For a varint that does not end, the position is the end of the message."""
    value = 0
    for shift, byte in enumerate(message[position : position + 10]):
        value |= (byte & 0x7F) << 7 * shift
        if byte <= 0x7F:
            return value, position + shift + 1
    return value, len(message)
