"""What surrounds the records of a segment: its first block, and the index written beside it.

First block, one 512-byte sector eight times, so that one bad sector does not cost the segment:

    magic "KVSEGMNT" | version u32 | number u32 | seed u64 | xxh3_64 of all that, u64

`seed` is a random number that is told to nobody; the checksums of the records are made with it.

The index of a sealed segment is a copy of the headers of its records, so that opening a store reads those and not
the segments. It is only ever an aid: without a sound one the segment itself is read.

    magic "KVSINDEX" | version u32 | number u32 | seed u64 | bytes of the segment u64 | xxh3_64 of the rest, u64
    for every record: first block u32 | header
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import xxhash

from kvstore_cluster.disk.record import BLOCK_BYTES, header_length
from kvstore_codec.errors import DiskFailedError

VERSION = 1
_SECTOR_BYTES = 512
_SEGMENT_MAGIC, _INDEX_MAGIC = b"KVSEGMNT", b"KVSINDEX"
_SEGMENT = struct.Struct("<8sIIQ")
_INDEX = struct.Struct("<8sIIQQ")
_BLOCK = struct.Struct("<I")
_CHECKSUM = struct.Struct("<Q")


def first_block(number: int, seed: int) -> bytes:
    signed = _SEGMENT.pack(_SEGMENT_MAGIC, VERSION, number, seed)
    sector = signed + _CHECKSUM.pack(xxhash.xxh3_64_intdigest(signed))
    return sector.ljust(_SECTOR_BYTES, b"\0") * (BLOCK_BYTES // _SECTOR_BYTES)


def seed_of(block: memoryview, number: int) -> int | None:
    """The seed in the first block of segment `number`; None when no sector of it is sound. Raises DiskFailedError for
    one that a newer version wrote."""
    for start in range(0, block.nbytes - _SEGMENT.size - _CHECKSUM.size + 1, _SECTOR_BYTES):
        magic, version, found_number, seed = _SEGMENT.unpack_from(block, start)
        signed = block[start : start + _SEGMENT.size]
        (checksum,) = _CHECKSUM.unpack_from(block, start + _SEGMENT.size)
        if magic == _SEGMENT_MAGIC and xxhash.xxh3_64_intdigest(signed) == checksum:
            if version != VERSION:
                raise DiskFailedError(
                    f"segment {number} has format version {version}, this service reads version {VERSION}; update it"
                )
            if found_number == number:
                return int(seed)
    return None


@dataclass(slots=True)
class SegmentIndex:
    """The headers of a segment's records, back to back, each behind its first block: in memory about 200 bytes a
    record."""

    entries: bytearray

    @property
    def file_bytes(self) -> int:
        """Size of the index file."""
        return _INDEX.size + _CHECKSUM.size + len(self.entries)

    def add(self, block: int, header: bytes | memoryview) -> None:
        self.entries += _BLOCK.pack(block)
        self.entries += header

    def __iter__(self) -> Iterator[tuple[int, memoryview]]:
        """(first block, header) of every record. The views are valid until something is added."""
        entries = memoryview(self.entries)
        position = 0
        while position < len(entries):
            (block,) = _BLOCK.unpack_from(entries, position)
            position += _BLOCK.size
            header = entries[position : position + header_length(entries[position:])]
            yield block, header
            position += len(header)

    def write(self, path: Path, number: int, seed: int, segment_bytes: int) -> None:
        """Writes the index file. Not synced: what a power loss leaves of it is found to
        be damaged. Raises OSError."""
        signed = _INDEX.pack(_INDEX_MAGIC, VERSION, number, seed, segment_bytes)
        hasher = xxhash.xxh3_64(signed)
        hasher.update(self.entries)
        with path.open("wb") as file:
            file.write(signed + _CHECKSUM.pack(hasher.intdigest()))
            file.write(self.entries)

    @classmethod
    def read(cls, path: Path, number: int, seed: int, segment_bytes: int) -> "SegmentIndex | None":
        """None when there is no sound index of a segment of that many bytes. Raises OSError."""
        try:
            data = bytearray(path.read_bytes())
        except FileNotFoundError:
            return None
        start = _INDEX.size + _CHECKSUM.size
        if len(data) < start or data[: _INDEX.size] != _INDEX.pack(
            _INDEX_MAGIC, VERSION, number, seed, segment_bytes
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
