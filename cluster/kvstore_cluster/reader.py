"""A stored chunk being read, frame range by frame range."""

from collections.abc import Iterator

from kvstore_cluster.arena import Arena
from kvstore_cluster.index import Entry
from kvstore_codec.chunk import ChunkHeader
from kvstore_codec.errors import FrameRangeError


class ChunkReader:
    """Views of a chunk that stays in memory while it is open. Made by `StorageNode.open`."""

    def __init__(self, arena: Arena, entry: Entry) -> None:
        self._arena = arena
        self._entry = entry
        self.ranges_read = 0
        self.bytes_read = 0

    @property
    def header(self) -> ChunkHeader:
        return self._entry.header

    def pieces(self, first_frame: int, frame_count: int, piece_bytes: int) -> Iterator[list[memoryview]]:
        """The bytes of the frames, in order, in pieces of at most `piece_bytes`. A piece is a list of
        read-only views, because a chunk may lie scattered over the arena. Raises FrameRangeError."""
        frames = self.header.geometry.frame_count
        if not 0 <= first_frame < first_frame + frame_count <= frames:
            raise FrameRangeError(
                f"frames [{first_frame}, {first_frame + frame_count}) asked of chunk "
                f"{self.header.chunk_id.short}, which has {frames}"
            )
        offset, length = self.header.range_bytes(first_frame, frame_count)
        self.ranges_read += 1
        for position in range(offset, offset + length, piece_bytes):
            size_bytes = min(piece_bytes, offset + length - position)
            self.bytes_read += size_bytes
            yield [view.toreadonly() for view in self._arena.views(self._entry.extent, position, size_bytes)]
