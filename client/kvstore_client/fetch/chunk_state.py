"""State of one chunk in a fetch: its source, and which reads are still to come."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from kvstore_client.fetch.base import ReadTask
from kvstore_client.fetch.cut import bytes_from, cut, slots_outside
from kvstore_client.match import StoredChunk
from kvstore_client.miss_reason import MissReason
from kvstore_client.planning import COMPUTE


@dataclass(slots=True, eq=False)
class ChunkState:
    """One chunk of a fetch. Guarded by the lock of its fetch.

    - Planned source: the chunk is to be read in one of its variants, or the engine is `to_compute` it.
    - `is_taken`: the engine has begun to compute it, so its source is final.
    - `is_delivered`: all of its KV is in the destination, read or computed.
    - `is_settled`: no more of it will arrive, because it is delivered or the engine is to compute it.
    - `is_lost`: it cannot be read (any more), so only the engine can provide it.
    """

    index: int
    chunk: StoredChunk
    layers: int
    skipped: Sequence[range] = ()
    """Positions that are not read because the engine computes them in any case, `joined`. Only for chunks whose variant
    is chosen once."""
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

    def __post_init__(self) -> None:
        self.open_tokens = [self.tokens] * self.layers
        self.open_token_layers = self.tokens * self.layers

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
        """Whether all of its KV is in the destination, read or computed."""
        return not self.open_token_layers

    @property
    def is_settled(self) -> bool:
        """Whether no more of the chunk will arrive."""
        return self.to_compute or self.is_delivered

    def left_bytes(self, variant: int) -> int | None:
        """Bytes still to be requested when the rest is read in `variant`; None when it cannot be."""
        if variant == self.choice:
            return sum(task.size_bytes for task in self.unread)
        next_layer = 0 if self.to_compute else self._next_layer()
        begun_bytes = sum(task.size_bytes for task in self._begun())
        left_bytes = bytes_from(self.chunk.variants[variant], next_layer) if next_layer < self.layers else 0
        return None if left_bytes is None else begun_bytes + left_bytes

    def left_share(self) -> float:
        """Share of the chunk that was not requested yet."""
        if self.to_compute:
            return 1.0
        values: int = sum(
            (task.layers.stop - task.layers.start) * (task.tokens.stop - task.tokens.start)
            for task in self.unread
        )
        return values / (self.tokens * self.layers)

    def choose(self, choice: int) -> None:
        """Read the rest in another variant, or have the engine compute the chunk. Reads already requested are then
        lost."""
        if choice == self.choice:
            return
        if choice == COMPUTE:
            self.is_lost |= self.left_share() < 1
            self.unread.clear()
            self.open_tokens = [self.tokens] * self.layers
            self.open_token_layers = self.tokens * self.layers
        elif self.skipped:
            variant = self.chunk.variants[choice]
            slots = slots_outside(self.chunk, variant, self.skipped)
            self.unread = cut(self.index, self.chunk, variant, slots=slots)
            tokens = sum(len(variant.header.geometry.tokens_of(slot)) for slot in slots)
            self.open_tokens = [tokens] * self.layers
            self.open_token_layers = tokens * self.layers
        else:
            begun, next_layer = self._begun(), 0 if self.to_compute else self._next_layer()
            self.unread = deque(begun)
            if next_layer < self.layers:
                self.unread += cut(self.index, self.chunk, self.chunk.variants[choice], next_layer)
        self.choice = choice

    def deliver(self, task: ReadTask) -> None:
        """Record that this read was delivered."""
        tokens = task.tokens.stop - task.tokens.start
        for layer in range(task.layers.start, task.layers.stop):
            self.open_tokens[layer] -= tokens
            self.open_token_layers -= tokens

    def requeue(self, tasks: list[ReadTask]) -> None:
        """Queue these reads, the latest requested ones, to be requested again."""
        self.unread.extendleft(reversed(tasks))

    def _begun(self) -> list[ReadTask]:
        """Remaining reads of a period that was partly requested; such a period is finished in its variant."""
        if not self.unread or self.unread[0].tokens.start == self.chunk.first_token:
            return []
        layer = self.unread[0].layers.start
        return [task for task in self.unread if task.layers.start == layer]

    def _next_layer(self) -> int:
        """The first layer that may still be read in any variant with a period that begins there."""
        begun = self._begun()
        return self.unread[len(begun)].layers.start if len(self.unread) > len(begun) else self.layers
