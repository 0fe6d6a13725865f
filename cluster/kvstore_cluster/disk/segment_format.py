"""The formats of a segment's first block and of its index file.

The first block repeats one 512-byte sector eight times, so that a bad sector does not make the segment unreadable:

    magic "KVSEGMNT" | version u32 | number u32 | seed u64 | xxh3_64 of all that, u64

`seed` is a secret random number, which seeds the checksums of the records. That is version 1, a plain segment. In
version 2 the records are encrypted (`encrypted_layout`), and the first block says with which key:

    magic "KVSEGMNT" | version u32 | number u32 | id of the key, 8 bytes | xxh3_64 of all that, u64 | salt | tag

The index of a sealed segment is a copy of its record headers, so that recovery reads the indexes instead of the
segments. When the index is missing or damaged, recovery scans the segment.

    magic "KVSINDEX" | version u32 | number u32 | seed u64 | bytes of the segment u64 | xxh3_64 of the rest, u64
    for every record: first block u32 | header

The index of an encrypted segment is encrypted as a whole.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import xxhash

from kvstore_cluster.disk.layout import RecordLayout
from kvstore_cluster.disk.record import BLOCK_BYTES, header_length, is_whole, kind_and_size, record_blocks
from kvstore_codec.errors import ChecksumError, DiskFailedError

VERSION, ENCRYPTED_VERSION = 1, 2
_SECTOR_BYTES = 512
_SEGMENT_MAGIC, _INDEX_MAGIC = b"KVSEGMNT", b"KVSINDEX"
_SEGMENT = struct.Struct("<8sIIQ")
_INDEX = struct.Struct("<8sIIQQ")
_BLOCK = struct.Struct("<I")
_CHECKSUM = struct.Struct("<Q")
_OPENING_BYTES = _SEGMENT.size + _CHECKSUM.size


def first_block(sector: bytes) -> bytes:
    """A block that repeats a sector."""
    return sector.ljust(_SECTOR_BYTES, b"\0") * (BLOCK_BYTES // _SECTOR_BYTES)


def opening(version: int, number: int, named: int) -> bytes:
    """The beginning of the first block's sector. `named` is the seed, or the id of the key as a number."""
    signed = _SEGMENT.pack(_SEGMENT_MAGIC, version, number, named)
    return signed + _CHECKSUM.pack(xxhash.xxh3_64_intdigest(signed))


def sectors(block: memoryview, number: int) -> Iterator[tuple[int, int, memoryview]]:
    """Yields (version, seed or id of the key, sector) of every sector with a sound opening in the first block of
    segment `number`. Raises DiskFailedError for a segment of another format version."""
    for start in range(0, block.nbytes, _SECTOR_BYTES):
        sector = block[start : start + _SECTOR_BYTES]
        if sector.nbytes < _OPENING_BYTES:
            return
        magic, version, found_number, named = _SEGMENT.unpack_from(sector)
        (checksum,) = _CHECKSUM.unpack_from(sector, _SEGMENT.size)
        if magic == _SEGMENT_MAGIC and xxhash.xxh3_64_intdigest(sector[: _SEGMENT.size]) == checksum:
            if version not in (VERSION, ENCRYPTED_VERSION):
                raise DiskFailedError(
                    f"segment {number} has format version {version}, but this release reads versions {VERSION} and "
                    f"{ENCRYPTED_VERSION}; update the service"
                )
            if found_number == number:
                yield version, named, sector


@dataclass(slots=True)
class SegmentIndex:
    """The headers of a segment's records, each preceded by the number of its first block. About 200 bytes per record in
    memory."""

    entries: bytearray

    @property
    def file_bytes(self) -> int:
        """Size of the index file."""
        return _INDEX.size + _CHECKSUM.size + len(self.entries)

    def add(self, block: int, header: bytes | memoryview) -> None:
        self.entries += _BLOCK.pack(block)
        self.entries += header

    def __iter__(self) -> Iterator[tuple[int, memoryview]]:
        """Yields (first block, header) of every record. The views are valid until the next `add`."""
        entries = memoryview(self.entries)
        position = 0
        while position < len(entries):
            (block,) = _BLOCK.unpack_from(entries, position)
            position += _BLOCK.size
            header = entries[position : position + header_length(entries[position:])]
            yield block, header
            position += len(header)

    def fits(self, blocks: int, layout: RecordLayout) -> bool:
        """Whether the entries are whole, and their records lie in a segment of so many blocks without overlap. What a
        checksum covers may still have been written by somebody else."""
        entries = memoryview(self.entries)
        position, places = 0, []
        while position < len(entries):
            header = entries[position + _BLOCK.size :]
            if not is_whole(header):
                return False
            (block,) = _BLOCK.unpack_from(entries, position)
            kind, size_bytes = kind_and_size(header)
            places.append((block, block + record_blocks(kind, size_bytes, layout.data_blocks)))
            position += _BLOCK.size + header_length(header)
        places.sort()
        ends = [1, *(end for _, end in places)]
        return ends[-1] <= blocks and all(end <= block for end, (block, _) in zip(ends, places, strict=False))

    def write(self, path: Path, number: int, layout: RecordLayout, segment_bytes: int) -> None:
        """Writes the index file without a sync: its checksum detects a partial file after a power loss. Raises
        OSError."""
        signed = _INDEX.pack(_INDEX_MAGIC, VERSION, number, layout.seed, segment_bytes)
        hasher = xxhash.xxh3_64(signed)
        hasher.update(self.entries)
        path.write_bytes(layout.index_file(signed + _CHECKSUM.pack(hasher.intdigest()) + self.entries))

    @classmethod
    def read(cls, path: Path, number: int, layout: RecordLayout, segment_bytes: int) -> "SegmentIndex | None":
        """Reads an index file. None when it is missing, damaged, or of a segment with another size. Raises OSError."""
        try:
            data = bytearray(layout.index_in(path.read_bytes()))
        except (FileNotFoundError, ChecksumError):
            return None
        start = _INDEX.size + _CHECKSUM.size
        if len(data) < start or data[: _INDEX.size] != _INDEX.pack(
            _INDEX_MAGIC, VERSION, number, layout.seed, segment_bytes
        ):
            return None
        with memoryview(data) as view:
            hasher = xxhash.xxh3_64(view[: _INDEX.size])
            hasher.update(view[start:])
            sound = (hasher.intdigest(),) == _CHECKSUM.unpack_from(view, _INDEX.size)
        if not sound:
            return None
        del data[:start]
        return cls(data)
