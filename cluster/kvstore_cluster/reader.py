"""A stored chunk being read, frame range by frame range."""

from collections.abc import Iterator
from functools import cached_property
from typing import Protocol

from kvstore_codec.chunk import ChunkHeader, read_header
from kvstore_codec.errors import FrameRangeError


class Source(Protocol):
    """Where a chunk's bytes come from, as long as it is held."""

    def header(self, slot: int) -> bytes:
        """The chunk's own header. Raises ChunkNotFoundError when it has gone or is damaged."""

    def views(self, slot: int, offset: int, length: int) -> Iterator[memoryview]:
        """Views that together are these bytes, in order. Raises ChunkNotFoundError likewise."""


class ChunkReader:
    """Views of a chunk that does not go away while it is open. Made by `StorageNode.open`."""

    def __init__(self, source: Source, slot: int, size_bytes: int) -> None:
        self._source = source
        self._slot = slot
        self.size_bytes = size_bytes
        self.ranges_read = 0
        self.bytes_read = 0

    @cached_property
    def header(self) -> ChunkHeader:
        return read_header(self._source.header(self._slot))

    def range_bytes(self, first_frame: int, frame_count: int) -> int:
        """How many bytes `pieces` would give. Raises FrameRangeError."""
        return self._range(first_frame, frame_count)[1]

    def pieces(self, first_frame: int, frame_count: int, piece_bytes: int) -> Iterator[list[memoryview]]:
        """The bytes of the frames, in order, in pieces of at most `piece_bytes`; of 0 frames from frame 0, those of the
        whole chunk with its header. A piece is a list of read-only views, because a chunk may lie scattered over the
        arena. Raises FrameRangeError, and ChunkNotFoundError when its disk has lost it."""
        offset, length = self._range(first_frame, frame_count)
        self.ranges_read += 1
        piece: list[memoryview] = []
        room = piece_bytes
        for view in self._source.views(self._slot, offset, length):
            rest = view.toreadonly()
            while rest.nbytes:
                part, rest = rest[:room], rest[room:]
                piece.append(part)
                room -= part.nbytes
                if not room:
                    self.bytes_read += piece_bytes
                    yield piece
                    piece, room = [], piece_bytes
        if piece:
            self.bytes_read += piece_bytes - room
            yield piece

    def _range(self, first_frame: int, frame_count: int) -> tuple[int, int]:
        if first_frame == frame_count == 0:
            return 0, self.size_bytes
        frames = self.header.geometry.frame_count
        if not 0 <= first_frame < first_frame + frame_count <= frames:
            raise FrameRangeError(
                f"frames [{first_frame}, {first_frame + frame_count}) asked of chunk "
                f"{self.header.chunk_id.short}, which has {frames}"
            )
        return self.header.range_bytes(first_frame, frame_count)
