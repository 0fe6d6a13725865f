"""A prefix in memory, and reads of its frames that a test completes as it likes."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from kvstore_client.contiguous.cache import FrameCache
from kvstore_client.contiguous.decoder import FrameDecoder
from kvstore_client.contiguous.grid import FrameGrid
from kvstore_client.contiguous.loader import FrameLoader
from kvstore_client.contiguous.report import ReprefillReport
from kvstore_client.fetch.base import ReadTask
from kvstore_client.frames import FrameRead
from kvstore_client.match import Match, StoredChunk, Variant
from kvstore_client.miss_reason import MissReason
from kvstore_codec.errors import CodecError
from kvstore_codec.rope import RotaryTable, rotate_
from tests.client.chunks import MEMBER, SPEC, encoded_chunk, ids, random_kv


def rotary(tokens: int) -> tuple[RotaryTable, ...]:
    """Another one for every position and layer."""
    angles = torch.outer(torch.arange(tokens).float(), torch.arange(1, SPEC.head_dim + 1) / 100)
    return tuple(RotaryTable((angles * n).cos(), (angles * n).sin()) for n in range(1, SPEC.layers + 1))


@dataclass
class Prefix:
    """Chunks of random KV, and the reads that a loader made of them. SPEC has two periods of 4 and 2 layers."""

    chunks: int = 2
    answers: bool = True
    """Whether reads are answered at once."""
    reads: list[FrameRead] = field(default_factory=list)
    unusable: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.encoded = [encoded_chunk(name, seed) for seed, name in enumerate(ids(self.chunks))]
        self.match = Match(
            tuple(
                StoredChunk(e.header.chunk_id, (Variant(e.header, e.parts[0]),), MEMBER, 256 * i)
                for i, e in enumerate(self.encoded)
            )
        )
        grid = FrameGrid.of(self.match)
        assert grid is not None
        self.grid = grid
        self.report = ReprefillReport()
        self.cache = FrameCache(64 << 20)

    def read(self, tasks: Sequence[ReadTask]) -> FrameRead:
        read = FrameRead(tasks, 20)
        self.reads.append(read)
        if self.answers:
            self.deliver(read)
        return read

    def deliver(self, read: FrameRead, edit: Callable[[bytes], bytes] = bytes) -> None:
        """Deliver all that is still wanted."""
        for index, task in enumerate(read.tasks):
            if read.begin(index):
                read.deliver(
                    index, memoryview(edit(self.encoded[task.chunk_index].parts[1 + task.first_frame]))
                )

    def fail(self, read: FrameRead, indices: Sequence[int]) -> None:
        read.fail(indices, MissReason.GONE)

    def asked(self, number: int) -> list[tuple[int, int]]:
        """Period and index of the frames of a read."""
        per_chunk = self.grid.frames_per_chunk
        found = [(t.chunk_index, *divmod(t.first_frame, per_chunk)) for t in self.reads[number].tasks]
        return [(period, chunk * per_chunk + slot) for chunk, period, slot in found]

    def loader(self, **options: float | bool) -> FrameLoader:
        def unusable(index: int, error: CodecError) -> None:
            self.unusable.append(index)

        def no_features(chunk: int) -> torch.Tensor:
            raise AssertionError("exact chunks need no features")

        decoder = FrameDecoder(self.grid, rotary(self.grid.tokens), no_features, unusable)
        limits = {"deadline_s": 20.0, "stall_s": 20.0} | options
        return FrameLoader(
            self.grid, self.read, decoder, self.cache, self.report, device=torch.device("cpu"), **limits
        )

    def frame(self, period: int, index: int) -> torch.Tensor:
        """What a loader returns for this frame."""
        keys, values = random_kv(index // 4)
        layers, place = self.grid.layers_of(period), slice(index % 4 * 64, index % 4 * 64 + 64)
        rotated = keys[layers.start : layers.stop, :, place].clone()
        tables = rotary(self.grid.tokens)
        for row, layer in enumerate(layers):
            rotate_(rotated[row], tables[layer].at(self.grid.tokens_of(index)))
        return torch.stack([rotated, values[layers.start : layers.stop, :, place]])
