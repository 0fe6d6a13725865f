"""Wire format of the bulk port, which carries KV bytes over plain TCP or TLS directly between socket and memory.

A connection begins with the client's PREFACE, then, if the client has a token, TOKEN and `length` bytes of it, followed
by requests and their answers in order. All numbers are
big-endian. Every request and answer begins with a header of 16 bytes:

    kind u16 | status u16 | index u32 | length u64

A client sends READ with `length` bytes of a ReadRequest, or PUT with `length` bytes of a PutStart. After a PUT it
always sends the chunk's `size_bytes` bytes, even if the put will be refused. It may send several puts without waiting.

A server answers a READ with one RANGE per requested range, in order: `index` is the range, `status` a ReadStatus, and
`length` bytes of frames follow, which is 0 unless the status is OK. `piece_bytes` has no effect here. It answers a READ
with `any_order` set likewise, but with FRAMES instead of RANGE and in any order. During such a read the client may send
CANCEL with a bitmap of `length` bytes: bit i % 8 (lowest first) of byte i / 8 stands for range i. The server answers
ranges that it has not read yet with the status CANCELLED. A CANCEL that arrives after its read has ended is ignored. A
server that answers with RANGE does not know CANCEL. The server answers each
PUT, in order, with PUT_REPLY and `length` bytes of a PutReply. It answers a request that it does not understand or
serve with REFUSED and `length` bytes of text for the user, and closes the connection. A put that is incomplete when the
connection ends is discarded. A TOKEN is not answered; when it is not valid, or a service with credentials has received
none, the next request is answered with REFUSED.
"""

import struct
from collections.abc import Iterable
from enum import IntEnum
from typing import NamedTuple

VERSION = 1
PREFACE = b"KVBULK" + VERSION.to_bytes(2, "big")
MAX_READ_REQUEST_BYTES = 8 << 20
MAX_PUT_START_BYTES = 64 << 10
MAX_TOKEN_BYTES = 256
MAX_FRAME_RANGES = 1 << 16
"""Ranges of a read with `any_order`."""
MAX_TEXT_BYTES = 4 << 10
"""Maximum size of a PutReply or of the text of a refusal."""

_HEADER = struct.Struct("!HHIQ")
HEADER_BYTES = _HEADER.size


class FrameKind(IntEnum):
    READ = 1
    PUT = 2
    RANGE = 3
    PUT_REPLY = 4
    REFUSED = 5
    FRAMES = 6
    CANCEL = 7
    TOKEN = 8


class FrameHeader(NamedTuple):
    """A received header. No field has been checked."""

    kind: int
    status: int
    range_index: int
    length: int


def pack_header(kind: FrameKind, length: int, *, status: int = 0, range_index: int = 0) -> bytes:
    return _HEADER.pack(kind, status, range_index, length)


def unpack_header(data: bytearray) -> FrameHeader:
    return FrameHeader(*_HEADER.unpack(data))


def pack_bits(indices: Iterable[int]) -> bytes:
    """The bitmap of a CANCEL for these ranges."""
    bitmap = bytearray()
    for index in sorted(indices):
        bitmap.extend(bytes(index // 8 + 1 - len(bitmap)))
        bitmap[index // 8] |= 1 << index % 8
    return bytes(bitmap)


def unpack_bits(bitmap: bytes | bytearray) -> list[int]:
    """Inverse of `pack_bits`, in ascending order."""
    return [
        8 * position + bit
        for position, byte in enumerate(bitmap)
        if byte
        for bit in range(8)
        if byte >> bit & 1
    ]
