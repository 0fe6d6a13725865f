"""What the ports of a storage node read chunks from: the node itself, or a node whose speed an experiment limits."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

from kvstore_cluster.frame_plan import FrameRange
from kvstore_codec.errors import StorageError
from kvstore_codec.identity import ChunkId


class OpenChunk(Protocol):
    """A stored chunk that is open for reading."""

    def range_bytes(self, first_frame: int, frame_count: int) -> int: ...

    def pieces(self, first_frame: int, frame_count: int, piece_bytes: int) -> Iterator[list[memoryview]]: ...


class FrameData(Protocol):
    """One range of a request, read or failed."""

    @property
    def index(self) -> int: ...
    @property
    def failure(self) -> StorageError | None: ...
    @property
    def size_bytes(self) -> int: ...

    def pieces(self, piece_bytes: int) -> Iterator[list[memoryview]]: ...


class OpenFrames(Protocol):
    """A request for many ranges of frames, as `FrameRead` describes it."""

    def drop(self, indices: Iterable[int]) -> None: ...

    def __iter__(self) -> Iterator[FrameData]: ...


class ChunkSource(Protocol):
    """`StorageNode` or `Experiments`."""

    def open(
        self, chunk_id: ChunkId, encoding: str, *, tenant: str = ""
    ) -> AbstractContextManager[OpenChunk]: ...

    def read_frames(
        self,
        chunks: Sequence[ChunkId],
        encodings: Sequence[str],
        ranges: Sequence[FrameRange],
        tenant: str = "",
    ) -> AbstractContextManager[OpenFrames]: ...
