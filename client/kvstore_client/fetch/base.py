"""Data that the stages of a fetch pass to each other."""

from dataclasses import dataclass

from kvstore_client.match import StoredChunk, Variant
from kvstore_codec.encoding import Encoding


@dataclass(frozen=True, slots=True)
class ReadTask:
    """One read: neighbouring frames of one period of a chunk's variant. Passes through all stages."""

    chunk_index: int
    chunk: StoredChunk
    variant: Variant
    first_frame: int
    frame_count: int
    layers: slice
    tokens: slice
    """Positions of these frames in the destination."""

    @property
    def size_bytes(self) -> int:
        return self.variant.header.range_bytes(self.first_frame, self.frame_count)[1]

    @property
    def encoding(self) -> Encoding:
        return self.variant.header.encoding

    @property
    def label(self) -> str:
        return f"chunk {self.chunk_index} layers {self.layers.start}-{self.layers.stop - 1}"


@dataclass(frozen=True, slots=True)
class ReceivedFrames:
    task: ReadTask
    data: memoryview
