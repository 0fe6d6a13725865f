"""One record of a segment: a block that says what the chunk is, then the chunk itself.

    magic "KVR\\0" | version u8 | kind u8 | header length u16 | checksum u64
    sequence u64 | size u64 | chunk header length u32 | horizon u32 | cost f64 | expires at f64
    lengths of encoding u8, tenant u16, calibration u8 | content_id | prefix_id | encoding | tenant | calibration
    number u32 | content_id | prefix_id of the chunk before it         only of chunks stored behind another one

All numbers are little-endian. The header has a block of its own, so that the chunk behind it is aligned for direct
I/O; the chunk is padded with zeros to whole blocks. The checksum is xxh3_64 over the rest of the header, seeded with
the segment's secret number: what it fits was written by this store as a record of that segment, and is no part of a
chunk that only looks like one. The chunk is not covered: its own checksums do that.

A tombstone is a header alone. It bears the number of the newest record there was when its chunk was deleted, and
deletes every record of that chunk and encoding up to that number.
"""

import struct
from dataclasses import dataclass
from enum import IntEnum

import xxhash
from typing_extensions import Buffer

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
_KIND = 5
_SUMMARY = struct.Struct("<B10xQQ")  # from `kind` on: kind, sequence, size
_MAX_NAME_BYTES = 255
_PLACE = struct.Struct("<I32s32s")


class Kind(IntEnum):
    PUT = 1
    TOMBSTONE = 2


@dataclass(frozen=True, slots=True)
class RecordMeta:
    """What is known of a stored chunk without reading it: enough to index it."""

    chunk_id: ChunkId
    encoding: str
    size_bytes: int
    header_bytes: int
    """Length of the chunk's own header, its first bytes."""
    calibration: bytes | None = None
    tenant: str = ""
    cost: float = 0.0
    expires_at_s: float = 0.0
    """Unix time; 0: never."""
    number: int = 0
    """How many chunks stand before it in its text, where that is known."""
    behind: ChunkId | None = None
    """The nearest of them that is on the same node."""


@dataclass(frozen=True, slots=True)
class RecordHeader:
    """What the first block of a record says. `horizon`, of a tombstone: the youngest segment that may hold a record
    it deletes."""

    kind: Kind
    sequence: int
    meta: RecordMeta
    horizon: int = 0

    def encode(self, seed: int) -> bytes:
        """The header's bytes, at most a block. Raises StorageError when its names are too long for that."""
        meta = self.meta
        encoding, tenant, calibration = meta.encoding.encode(), meta.tenant.encode(), meta.calibration or b""
        place = b""
        if meta.behind is not None:
            place = _PLACE.pack(meta.number, meta.behind.content_id, meta.behind.prefix_id)
        length = _NAMES_START + len(encoding) + len(tenant) + len(calibration) + len(place)
        if length > BLOCK_BYTES or max(len(encoding), len(calibration)) > _MAX_NAME_BYTES:
            raise StorageError(
                f"chunk {meta.chunk_id.short} cannot be put on disk: its description has {length} bytes, at most "
                f"{BLOCK_BYTES} fit; shorten the name of its tenant"
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
    """How many blocks `size_bytes` take."""
    return -(-size_bytes // BLOCK_BYTES)


def record_blocks(kind: int, size_bytes: int) -> int:
    """Blocks of a whole record of a chunk of that size; a tombstone is its header alone."""
    return 1 + blocks_of(size_bytes) if kind == Kind.PUT else 1


def record_bytes(size_bytes: int) -> int:
    """What a chunk of `size_bytes` takes on disk."""
    return (1 + blocks_of(size_bytes)) * BLOCK_BYTES


def is_header(block: memoryview, seed: int) -> bool:
    """Whether a sound header of a record of the segment with that seed begins here."""
    if block.nbytes < _NAMES_START:
        return False
    magic, version, _, length = _OPENING.unpack_from(block)
    if magic != _MAGIC or version != _VERSION or not _NAMES_START <= length <= block.nbytes:
        return False
    (checksum,) = _CHECKSUM.unpack_from(block, _OPENING.size)
    return _checksum(block[: _OPENING.size], block[_FIELDS_START:length], seed) == int(checksum)


def header_length(header: memoryview) -> int:
    """Bytes of a sound header."""
    return int(_OPENING.unpack_from(header)[3])


def summary(header: memoryview, key_seed: int) -> tuple[int, int, int, int]:
    """(kind, sequence, size in bytes, key) of a sound header: what tells which record of a chunk is the newest.

    `key` is 128 bits of its ids and encoding. The keys of one comparison are made with one seed that nobody can guess,
    so that nobody can make two chunks with the same key.
    """
    kind, sequence, size_bytes = _SUMMARY.unpack_from(header, _KIND)
    ids_end = _NAMES_START + header[_ENCODING_LENGTH]
    return kind, sequence, size_bytes, xxhash.xxh3_128_intdigest(header[_IDS_START:ids_end], key_seed)


def decode(header: memoryview) -> RecordHeader:
    """What a sound header says."""
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
    # Records of earlier versions end here, and what a later one may add is behind it.
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
