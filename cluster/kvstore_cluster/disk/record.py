"""The format of a record: one block with a header that describes the chunk, followed by the chunk.

    magic "KVR\\0" | version u8 | kind u8 | header length u16 | checksum u64
    sequence u64 | size u64 | chunk header length u32 | horizon u32 | cost f64 | expires at f64
    lengths of encoding u8, tenant u16, calibration u8 | content_id | prefix_id | encoding | tenant | calibration
    number u32 | content_id | prefix_id of the chunk before it         only if the predecessor in the text is known

All numbers are little-endian. The header has its own block, so that the chunk after it is aligned for direct I/O. The
chunk is padded with zeros to whole blocks. The checksum is xxh3_64 over the rest of the header, seeded with the secret
seed of the segment. A matching checksum proves that this store wrote the header as a record of that segment: bytes in a
chunk cannot imitate a header. The checksum does not cover the chunk, which has its own checksums.

A tombstone is a header without a chunk. It has the sequence number of the newest record at the time of the deletion,
and deletes every record of its chunk and encoding up to that number.
"""

import math
import struct
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum

import xxhash
from typing_extensions import Buffer

from kvstore_cluster.disk.location import MAX_SEGMENT_BLOCKS
from kvstore_codec.errors import StorageError
from kvstore_codec.identity import ChunkId, ContentId, PrefixId

BLOCK_BYTES = 4096

_MAGIC = b"KVR\0"
_VERSION = 1
_OPENING = struct.Struct("<4sBBH")
_CHECKSUM = struct.Struct("<Q")
_FIELDS = struct.Struct("<QQIIddBHB32s32s")
_FIELDS_START = _OPENING.size + _CHECKSUM.size
_NAMES_START = _FIELDS_START + _FIELDS.size
_IDS_START = _NAMES_START - 64
_ENCODING_LENGTH = _IDS_START - 4
_TENANT_LENGTH = struct.Struct("<H")
_KIND = 5
_SUMMARY = struct.Struct("<B10xQQ")  # from `kind` on: kind, sequence, size
_MAX_NAME_BYTES = 255
_PLACE = struct.Struct("<I32s32s")


_LARGEST_SEQUENCE = (1 << 63) - 1


class Kind(IntEnum):
    PUT = 1
    TOMBSTONE = 2


_KINDS = frozenset(Kind)


@dataclass(frozen=True, slots=True)
class RecordMeta:
    """Metadata of a stored chunk. Contains everything that the index needs."""

    chunk_id: ChunkId
    encoding: str
    size_bytes: int
    header_bytes: int
    """Length of the chunk's own header, its first bytes."""
    calibration: bytes | None = None
    tenant: str = ""
    cost: float = 0.0
    expires_at_s: float = 0.0
    """Unix time at which the chunk expires. 0 means never."""
    number: int = 0
    """Number of chunks before this one in its text, or 0 when unknown."""
    behind: ChunkId | None = None
    """The nearest earlier chunk of its text on the same node."""


@dataclass(frozen=True, slots=True)
class RecordHeader:
    """The header of a record. The `horizon` of a tombstone is the number of the newest segment that may hold a record
    it deletes."""

    kind: Kind
    sequence: int
    meta: RecordMeta
    horizon: int = 0

    def encode(self, seed: int, room_bytes: int = BLOCK_BYTES) -> bytes:
        """Encodes the header, without padding. Raises StorageError when its names are too long for `room_bytes`."""
        meta = self.meta
        encoding, tenant, calibration = meta.encoding.encode(), meta.tenant.encode(), meta.calibration or b""
        place = b""
        if meta.behind is not None:
            place = _PLACE.pack(meta.number, meta.behind.content_id, meta.behind.prefix_id)
        length = _NAMES_START + len(encoding) + len(tenant) + len(calibration) + len(place)
        if length > room_bytes or max(len(encoding), len(calibration)) > _MAX_NAME_BYTES:
            raise StorageError(
                f"chunk {meta.chunk_id.short} cannot be put on disk: its metadata has {length} bytes, but at most "
                f"{room_bytes} fit; shorten the name of its tenant"
            )
        fields = _FIELDS.pack(
            self.sequence,
            meta.size_bytes,
            meta.header_bytes,
            self.horizon,
            meta.cost,
            meta.expires_at_s,
            len(encoding),
            len(tenant),
            len(calibration),
            meta.chunk_id.content_id,
            meta.chunk_id.prefix_id,
        )
        opening = _OPENING.pack(_MAGIC, _VERSION, self.kind, length)
        signed = b"".join((fields, encoding, tenant, calibration, place))
        return b"".join((opening, _CHECKSUM.pack(_checksum(opening, signed, seed)), signed))


def blocks_of(size_bytes: int) -> int:
    """Number of blocks that `size_bytes` take."""
    return -(-size_bytes // BLOCK_BYTES)


def record_blocks(kind: int, size_bytes: int, data_blocks: Callable[[int], int]) -> int:
    """Number of blocks of a record, including its header. `data_blocks` returns those of a chunk. A tombstone has only
    a header."""
    return 1 + data_blocks(size_bytes) if kind == Kind.PUT else 1


def is_header(block: memoryview, seed: int) -> bool:
    """Whether `block` begins with a sound record header of the segment with this seed."""
    if block.nbytes < _NAMES_START:
        return False
    magic, version, _, length = _OPENING.unpack_from(block)
    if magic != _MAGIC or version != _VERSION or not _NAMES_START <= length <= block.nbytes:
        return False
    (checksum,) = _CHECKSUM.unpack_from(block, _OPENING.size)
    found = _checksum(block[: _OPENING.size], block[_FIELDS_START:length], seed)
    return found == int(checksum) and is_whole(block)


def is_whole(header: memoryview) -> bool:
    """Whether a header with a sound checksum has the bytes of all its fields, and numbers that a store writes. A store
    that finds others would fail at the next start, too."""
    if header.nbytes < _NAMES_START or not _NAMES_START <= header_length(header) <= header.nbytes:
        return False
    sequence, size_bytes, header_bytes, _, cost, expires_at_s, *lengths, _, _ = _FIELDS.unpack_from(
        header, _FIELDS_START
    )
    encoding_length, tenant_length, calibration_length = lengths
    names_end = _NAMES_START + encoding_length + tenant_length
    try:
        str(header[_NAMES_START : _NAMES_START + encoding_length], "utf-8")
        str(header[_NAMES_START + encoding_length : names_end], "utf-8")
    except UnicodeDecodeError:
        return False
    return (
        header[_KIND] in _KINDS
        and names_end + calibration_length <= header_length(header)
        and sequence <= _LARGEST_SEQUENCE
        and header_bytes <= size_bytes < MAX_SEGMENT_BLOCKS * BLOCK_BYTES
        and (header[_KIND] == Kind.TOMBSTONE or header_bytes > 0)
        and math.isfinite(cost)
        and math.isfinite(expires_at_s)
    )


def header_length(header: memoryview) -> int:
    """Length of a sound header in bytes."""
    return int(_OPENING.unpack_from(header)[3])


def summary(header: memoryview, key_seed: int, *, with_tenant: bool = False) -> tuple[int, int, int, int]:
    """(kind, sequence, size in bytes, key) of a sound header: the fields that find the newest record of a chunk.

    `key` is a 128-bit hash of the ids and the encoding, and of the tenant if `with_tenant` is set. All compared keys
    use the same random `key_seed`, so that a client cannot construct two chunks with the same key.
    """
    kind, sequence, size_bytes = _SUMMARY.unpack_from(header, _KIND)
    ids_end = _NAMES_START + header[_ENCODING_LENGTH]
    named = header[_IDS_START:ids_end]
    if with_tenant:  # its name follows the encoding; the lengths say where one ends and the other begins
        lengths = header[_ENCODING_LENGTH : _ENCODING_LENGTH + 1 + _TENANT_LENGTH.size]
        (tenant_length,) = _TENANT_LENGTH.unpack_from(lengths, 1)
        named = memoryview(b"".join((lengths, header[_IDS_START : ids_end + tenant_length])))
    return kind, sequence, size_bytes, xxhash.xxh3_128_intdigest(named, key_seed)


def kind_and_size(header: memoryview) -> tuple[int, int]:
    """(kind, size of the chunk in bytes) of a whole header."""
    kind, _, size_bytes = _SUMMARY.unpack_from(header, _KIND)
    return kind, size_bytes


def tenant_of(header: memoryview) -> tuple[str, int]:
    """(tenant, sequence) of a sound header. Faster than `decode`."""
    _, sequence, _ = _SUMMARY.unpack_from(header, _KIND)
    start = _NAMES_START + header[_ENCODING_LENGTH]
    (length,) = _TENANT_LENGTH.unpack_from(header, _ENCODING_LENGTH + 1)
    return str(header[start : start + length], "utf-8"), sequence


def decode(header: memoryview) -> RecordHeader:
    """Decodes a sound header."""
    (
        sequence,
        size_bytes,
        header_bytes,
        horizon,
        cost,
        expires_at_s,
        encoding_length,
        tenant_length,
        calibration_length,
        content_id,
        prefix_id,
    ) = _FIELDS.unpack_from(header, _FIELDS_START)
    tenant_start = _NAMES_START + encoding_length
    calibration_start = tenant_start + tenant_length
    place_start = calibration_start + calibration_length
    number, behind = 0, None
    # Headers of earlier versions end here. A later version may append more fields.
    if header_length(header) >= place_start + _PLACE.size:
        number, *before = _PLACE.unpack_from(header, place_start)
        behind = ChunkId(*before)
    meta = RecordMeta(
        ChunkId(ContentId(content_id), PrefixId(prefix_id)),
        str(header[_NAMES_START:tenant_start], "utf-8"),
        size_bytes,
        header_bytes,
        bytes(header[calibration_start:place_start]) or None,
        str(header[tenant_start:calibration_start], "utf-8"),
        cost,
        expires_at_s,
        number,
        behind,
    )
    return RecordHeader(Kind(header[_KIND]), sequence, meta, horizon)


def _checksum(opening: Buffer, signed: Buffer, seed: int) -> int:
    hasher = xxhash.xxh3_64(opening, seed)
    hasher.update(signed)
    return int(hasher.intdigest())
