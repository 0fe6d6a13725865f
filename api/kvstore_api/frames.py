"""The bulk port: KV bytes over plain TCP or TLS, with as little as possible between the socket and the memory.

A connection begins with the client's PREFACE and then carries requests and their answers, one after the other; all
numbers are big-endian. Everything begins with a header of 16 bytes:

    kind u16 | status u16 | index u32 | length u64

A client sends READ, followed by `length` bytes of a ReadRequest, or PUT, followed by `length` bytes of a PutStart and
then, whatever becomes of it, by the chunk's `size_bytes` bytes. Puts may follow each other without waiting.

A server answers a READ with one RANGE for each range asked for, in order: `index` is the range, `status` a ReadStatus,
and `length` bytes of frames follow, none unless the status is OK. `piece_bytes` has no meaning here. It answers each
PUT, in order, with PUT_REPLY and `length` bytes of a PutReply. Anything it does not understand or will not serve it
answers with REFUSED, `length` bytes of text for a person, and the end of the connection. A put that was not sent
whole before the connection ended leaves nothing behind.
"""

import struct
from enum import IntEnum
from typing import NamedTuple

VERSION = 1
PREFACE = b"KVBULK" + VERSION.to_bytes(2, "big")
MAX_READ_REQUEST_BYTES = 8 << 20
MAX_PUT_START_BYTES = 64 << 10
MAX_TEXT_BYTES = 4 << 10
"""Of a PutReply or a refusal."""

_HEADER = struct.Struct("!HHIQ")
HEADER_BYTES = _HEADER.size


class FrameKind(IntEnum):
    READ = 1
    PUT = 2
    RANGE = 3
    PUT_REPLY = 4
    REFUSED = 5


class FrameHeader(NamedTuple):
    """As it came: neither the kind nor anything else was checked."""

    kind: int
    status: int
    range_index: int
    length: int


def pack_header(kind: FrameKind, length: int, *, status: int = 0, range_index: int = 0) -> bytes:
    return _HEADER.pack(kind, status, range_index, length)


def unpack_header(data: bytearray) -> FrameHeader:
    return FrameHeader(*_HEADER.unpack(data))
