"""Limits on the speed of a storage node, for experiments: how fast it sends, and how fast it reads its disk."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

from kvstore_api.v1 import kvstore_pb2 as pb
from kvstore_cluster.frame_plan import FrameRange
from kvstore_cluster.slow_disk import SlowNode
from kvstore_codec.identity import ChunkId
from kvstore_service.chunk_source import FrameData, OpenChunk, OpenFrames
from kvstore_service.throttle import Throttle

START = "start it with `kvstore serve --experiments`, or KVSTORE_EXPERIMENTS=true"


class Experiments:
    """The speed limits of one node. It starts without limits. Thread-safe."""

    def __init__(self, node: SlowNode) -> None:
        self._node = node
        self._throttle = Throttle()

    @contextmanager
    def open(self, chunk_id: ChunkId, encoding: str, *, tenant: str = "") -> Iterator[OpenChunk]:
        """Like `StorageNode.open`, but reading from the chunk blocks as the bandwidth limit demands."""
        with self._node.open(chunk_id, encoding, tenant=tenant) as reader:
            yield _PacedChunk(reader, self._throttle)

    @contextmanager
    def read_frames(
        self,
        chunks: Sequence[ChunkId],
        encodings: Sequence[str],
        ranges: Sequence[FrameRange],
        tenant: str = "",
    ) -> Iterator[OpenFrames]:
        """Like `StorageNode.read_frames`, but reading blocks as the bandwidth limit demands."""
        with self._node.read_frames(chunks, encodings, ranges, tenant) as read:
            yield _PacedFrames(read, self._throttle)

    def set_limits(self, request: pb.ThrottleRequest) -> None:
        """Sets the limits that the request contains. Raises ConfigurationError."""
        if request.HasField("disk_read_Bps"):
            self._node.limit_disk(request.disk_read_Bps or None)
        # Older clients, which do not know the disk limit, leave out the bandwidth to remove its limit.
        if request.HasField("bandwidth_bps") or not request.HasField("disk_read_Bps"):
            self._throttle.set(request.bandwidth_bps or None)

    def gauges(self) -> dict[str, int]:
        bandwidth_bps = self._throttle.bandwidth_bps
        return {} if bandwidth_bps is None else {"throttle_bps": int(bandwidth_bps)}

    def end(self) -> None:
        """Removes the limits. Threads that wait under them continue."""
        self._throttle.set(None)
        self._node.limit_disk(None)


class _PacedChunk:
    def __init__(self, chunk: OpenChunk, throttle: Throttle) -> None:
        self._chunk = chunk
        self._throttle = throttle

    def range_bytes(self, first_frame: int, frame_count: int) -> int:
        return self._chunk.range_bytes(first_frame, frame_count)

    def pieces(self, first_frame: int, frame_count: int, piece_bytes: int) -> Iterator[list[memoryview]]:
        for piece in self._chunk.pieces(first_frame, frame_count, piece_bytes):
            yield from self._throttle.paced(piece)


class _PacedFrames:
    def __init__(self, read: OpenFrames, throttle: Throttle) -> None:
        self._read = read
        self._throttle = throttle

    def drop(self, indices: Iterable[int]) -> None:
        self._read.drop(indices)

    def __iter__(self) -> Iterator[FrameData]:
        for data in self._read:
            yield _PacedData(data, self._throttle)


class _PacedData:
    def __init__(self, data: FrameData, throttle: Throttle) -> None:
        self.index, self.failure, self.size_bytes = data.index, data.failure, data.size_bytes
        self._data = data
        self._throttle = throttle

    def pieces(self, piece_bytes: int) -> Iterator[list[memoryview]]:
        for piece in self._data.pieces(piece_bytes):
            yield from self._throttle.paced(piece)
