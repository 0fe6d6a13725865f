"""Plans disk reads of single frames: neighbouring ranges of a chunk are read together, in whole blocks."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from kvstore_cluster.block_buffers import LARGEST_BYTES
from kvstore_cluster.disk.record import BLOCK_BYTES
from kvstore_codec.chunk import ChunkHeader
from kvstore_codec.errors import FrameRangeError


class FrameRange(Protocol):
    """Consecutive frames of one of a request's chunks. 0 frames from frame 0 mean the whole chunk."""

    @property
    def chunk(self) -> int: ...
    @property
    def first_frame(self) -> int: ...
    @property
    def frame_count(self) -> int: ...


@dataclass(frozen=True, slots=True)
class PlacedRange:
    """A range of a request, and where its bytes lie in its chunk."""

    index: int
    """Index of the range in the request."""
    first_frame: int
    frame_count: int
    offset: int
    length: int

    @property
    def end(self) -> int:
        return self.offset + self.length


@dataclass(frozen=True, slots=True)
class BlockRead:
    """One read of whole blocks, which contain these ranges."""

    offset: int
    length: int
    ranges: tuple[PlacedRange, ...]


def bytes_of_frames(header: ChunkHeader, first_frame: int, frame_count: int) -> tuple[int, int]:
    """(offset, length) in its chunk of one or more consecutive frames. Raises FrameRangeError."""
    frames = header.geometry.frame_count
    if not 0 <= first_frame < first_frame + frame_count <= frames:
        raise FrameRangeError(
            f"frames [{first_frame}, {first_frame + frame_count}) were requested of chunk "
            f"{header.chunk_id.short}, which has {frames} frames"
        )
    return header.range_bytes(first_frame, frame_count)


def blocks_around(ranges: tuple[PlacedRange, ...], block_bytes: int) -> BlockRead:
    """The read of all blocks that contain these ranges, which are in the order of their offsets."""
    begin, end = _blocks(ranges[0].offset, max(placed.end for placed in ranges), block_bytes)
    return BlockRead(begin, end - begin, ranges)


def block_reads(
    ranges: Iterable[PlacedRange],
    *,
    merge: bool = True,
    most_bytes: int = LARGEST_BYTES,
    block_bytes: int = BLOCK_BYTES,
) -> list[BlockRead]:
    """The reads of these ranges of one chunk, in whole blocks of `block_bytes`, none larger than `most_bytes` unless a
    single range is. Ranges whose blocks touch or overlap are read together: no byte between them is read for nothing.
    The read with the first range of the request comes first."""
    groups: list[list[PlacedRange]] = []
    begin = end = 0
    for placed in sorted(ranges, key=lambda placed: (placed.offset, placed.length)):
        first, last = _blocks(placed.offset, placed.end, block_bytes)
        if groups and merge and first <= end and max(end, last) - begin <= most_bytes:
            groups[-1].append(placed)
            end = max(end, last)
        else:
            groups.append([placed])
            begin, end = first, last
    reads = [blocks_around(tuple(group), block_bytes) for group in groups]
    return sorted(reads, key=lambda read: min(placed.index for placed in read.ranges))


def _blocks(offset: int, end: int, block_bytes: int) -> tuple[int, int]:
    """Bounds of the blocks that contain the bytes [offset, end)."""
    return offset - offset % block_bytes, end + -end % block_bytes
