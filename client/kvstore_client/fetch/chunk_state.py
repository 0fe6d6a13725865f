"""State of one chunk in a fetch: its source, and which reads are still to come."""

from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from kvstore_client.fetch.base import ReadTask
from kvstore_client.fetch.cut import by_layers, cut, size_of
from kvstore_client.fetch.wanted import WantedFrames
from kvstore_client.match import StoredChunk, Variant
from kvstore_client.miss_reason import MissReason
from kvstore_client.planning import COMPUTE


@dataclass(slots=True, eq=False)
class ChunkState:
    """One chunk of a fetch. Guarded by the lock of its fetch.

    - Planned source: the chunk is to be read in one of its variants, or the engine is `to_compute` it.
    - `is_taken`: the engine has begun to compute it, so its source is final.
    - `is_delivered`: all KV of it that the engine needs is in the destination, read or computed.
    - `is_settled`: no more of it will arrive, because it is delivered or the engine is to compute it.
    - `is_lost`: it cannot be read (any more), so only the engine can provide it.
    """

    index: int
    layers: int
    wanted: WantedFrames
    """The frames that are read. Grows while the fetch runs (`read_before`), and never shrinks."""
    choice: int = COMPUTE
    """Index into the chunk's variants, or COMPUTE."""
    unread: deque[ReadTask] = field(default_factory=deque)
    """Reads of that variant that were not requested yet, first layers first."""
    decoding: int = 0
    """Number of its reads that are being written to the destination now."""
    open_tokens: list[int] = field(default_factory=list)
    """Number of tokens not delivered yet, by layer."""
    open_token_layers: int = 0
    """Sum of `open_tokens`."""
    is_lost: bool = False
    """Whether the chunk cannot be read: it is missing, some of it was discarded, or nothing reads from its member any
    more."""
    is_taken: bool = False
    """Whether the engine computes the chunk now, or has computed it."""
    reason: MissReason | None = None
    """Why the chunk is missing."""
    _requested: Counter[int] = field(default_factory=Counter)
    """Number of reads requested and not requeued, by the layer behind their period."""
    _sources: list[tuple[int, int]] = field(default_factory=list)
    """First layer and variant of each stretch of layers that is read in one variant, in order."""

    def __post_init__(self) -> None:
        self._open_all()

    @property
    def chunk(self) -> StoredChunk:
        return self.wanted.chunk

    @property
    def tokens(self) -> int:
        return self.chunk.header.geometry.tokens

    @property
    def body_bytes(self) -> int:
        """Total size of all frames of the variant that is read, bytes."""
        header = self.chunk.variants[self.choice].header
        return header.size_bytes - header.header_bytes

    @property
    def to_compute(self) -> bool:
        """Whether the engine provides the chunk: it has computed it, computes it or will."""
        return self.choice == COMPUTE

    @property
    def is_delivered(self) -> bool:
        """Whether all of its KV that the engine needs is in the destination, read or computed."""
        return not self.open_token_layers

    @property
    def is_settled(self) -> bool:
        """Whether no more of the chunk will arrive."""
        return self.to_compute or self.is_delivered

    def left(self, variant: int) -> tuple[int, float] | None:
        """Bytes, and tokens summed over the layers / layers, still to be requested when the rest is read in `variant`;
        None when it cannot be."""
        if variant == self.choice:
            return self._size(self.unread)
        behind = size_of(self.chunk.variants[variant], self.wanted.slots, self._begun_layers)
        if behind is None:
            return None
        begun_bytes, begun_tokens = self._size(self._begun())
        return begun_bytes + behind[0], begun_tokens + behind[1] / self.layers

    def choose(self, choice: int) -> None:
        """Read the rest in another variant, or have the engine compute the chunk. Reads already requested are then
        lost."""
        if choice == self.choice:
            return
        if choice == COMPUTE:
            self.is_lost |= self._begun_layers > 0
            self.unread.clear()
            self._sources.clear()
            self._open_all()
        else:
            if self.to_compute:
                self.open_tokens = [0] * self.layers
                self.open_token_layers = 0
            begun, next_layer = self._begun(), self._begun_layers
            for task in self.unread:
                if task.layers.start >= next_layer:
                    self._open(task, -1)
            variant = self.chunk.variants[choice]
            self.unread = deque(begun)
            self._add(cut(self.index, self.chunk, variant, self.wanted.slots, next_layer))
            self._sources = [source for source in self._sources if source[0] < next_layer]
            self._sources.append((next_layer, choice))
        self.choice = choice

    def read_before(self, computed_from: int, *, readable: bool) -> bool:
        """Read also what the engine needs to compute from position `computed_from` on. Returns False when more would
        have to be read and is not `readable`."""
        if computed_from >= self.wanted.computed_from:
            return True
        before, self.wanted = self.wanted, replace(self.wanted, computed_from=computed_from)
        added = [] if self.to_compute else list(self._added(before))
        if not added:
            return True
        if readable:
            self._add(added)
            self.unread = deque(sorted(self.unread, key=by_layers))
        return readable

    def take(self) -> ReadTask:
        """Remove and return the first unread read, which is requested now."""
        task = self.unread.popleft()
        self._requested[task.layers.stop] += 1
        return task

    def deliver(self, task: ReadTask) -> None:
        """Record that this read was delivered."""
        self._open(task, -1)

    def requeue(self, tasks: list[ReadTask]) -> None:
        """Queue these reads, the latest requested ones, to be requested again."""
        self.unread.extendleft(reversed(tasks))
        for task in tasks:
            self._requested[task.layers.stop] -= 1

    def _begun(self) -> list[ReadTask]:
        """Remaining reads of periods that were partly requested; such a period is finished in its variant."""
        next_layer = self._begun_layers
        return [task for task in self.unread if task.layers.start < next_layer]

    @property
    def _begun_layers(self) -> int:
        """The first layer that may still be read in any variant with a period that begins there."""
        return max((layer for layer, reads in self._requested.items() if reads), default=0)

    def _added(self, before: WantedFrames) -> Iterator[ReadTask]:
        """Reads of the frames that are wanted now and were not `before`, in the variant of their layers."""

        def added(variant: Variant, layers: range) -> Sequence[int]:
            return self.wanted.added(before, variant, layers)

        ends = [first for first, _ in self._sources[1:]]
        for (first, choice), end in zip(self._sources, [*ends, None], strict=True):
            yield from cut(self.index, self.chunk, self.chunk.variants[choice], added, first, end)

    def _add(self, tasks: Iterable[ReadTask]) -> None:
        for task in tasks:
            self.unread.append(task)
            self._open(task, 1)

    def _open(self, task: ReadTask, sign: int) -> None:
        tokens = sign * (task.tokens.stop - task.tokens.start)
        for layer in range(task.layers.start, task.layers.stop):
            self.open_tokens[layer] += tokens
            self.open_token_layers += tokens

    def _open_all(self) -> None:
        self.open_tokens = [self.tokens] * self.layers
        self.open_token_layers = self.tokens * self.layers

    def _size(self, tasks: Iterable[ReadTask]) -> tuple[int, float]:
        size_bytes = token_layers = 0
        for task in tasks:
            size_bytes += task.size_bytes
            token_layers += (task.layers.stop - task.layers.start) * (task.tokens.stop - task.tokens.start)
        return size_bytes, token_layers / self.layers
