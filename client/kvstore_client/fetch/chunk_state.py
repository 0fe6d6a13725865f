"""What a fetch knows of each chunk: how it comes, and what of it is still to come."""

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
    """Guarded by the lock of its fetch."""

    index: int
    chunk: StoredChunk
    layers: int
    computed: Sequence[range] = ()
    """Positions that the engine computes in any case, `joined`. Only for chunks whose variant is chosen once."""
    choice: int = COMPUTE
    """Index into the chunk's variants, or COMPUTE."""
    unread: deque[ReadTask] = field(default_factory=deque)
    """Not asked for yet, in that variant, the first layers first."""
    decoding: int = 0
    """Reads of it that are being written to their place now."""
    open_tokens: list[int] = field(default_factory=list)
    """Of each layer, how many tokens have not been delivered."""
    open_token_layers: int = 0
    is_lost: bool = False
    """It cannot be read any more: it is missing, or some of it was thrown away."""
    is_engines: bool = False
    """The engine computes it, or has computed it."""
    reason: MissReason | None = None
    """Why it will not come, although it should have."""

    def __post_init__(self) -> None:
        self.open_tokens = [self.tokens] * self.layers
        self.open_token_layers = self.tokens * self.layers

    @property
    def tokens(self) -> int:
        return self.chunk.header.geometry.tokens

    @property
    def is_computed(self) -> bool:
        return self.choice == COMPUTE

    @property
    def is_delivered(self) -> bool:
        return not self.open_token_layers

    @property
    def is_settled(self) -> bool:
        """Nothing more of it will come."""
        return self.is_computed or self.is_delivered

    def left_bytes(self, variant: int) -> int | None:
        """Bytes still to be asked for when the rest comes in `variant`; None when it cannot."""
        if variant == self.choice:
            return sum(task.size_bytes for task in self.unread)
        next_layer = 0 if self.is_computed else self._next_layer()
        begun_bytes = sum(task.size_bytes for task in self._begun())
        left_bytes = bytes_from(self.chunk.variants[variant], next_layer) if next_layer < self.layers else 0
        return None if left_bytes is None else begun_bytes + left_bytes

    def left_share(self) -> float:
        """Share of the chunk that has not been asked for."""
        if self.is_computed:
            return 1.0
        values: int = sum(
            (task.layers.stop - task.layers.start) * (task.tokens.stop - task.tokens.start)
            for task in self.unread
        )
        return values / (self.tokens * self.layers)

    def choose(self, choice: int) -> None:
        """Have the rest come in another variant, or the chunk be computed. What was asked for of it is then lost."""
        if choice == self.choice:
            return
        if choice == COMPUTE:
            self.is_lost |= self.left_share() < 1
            self.unread.clear()
            self.open_tokens = [self.tokens] * self.layers
            self.open_token_layers = self.tokens * self.layers
        elif self.computed:
            variant = self.chunk.variants[choice]
            slots = slots_outside(self.chunk, variant, self.computed)
            self.unread = cut(self.index, self.chunk, variant, slots=slots)
            tokens = sum(len(variant.header.geometry.tokens_of(slot)) for slot in slots)
            self.open_tokens = [tokens] * self.layers
            self.open_token_layers = tokens * self.layers
        else:
            begun, next_layer = self._begun(), 0 if self.is_computed else self._next_layer()
            self.unread = deque(begun)
            if next_layer < self.layers:
                self.unread += cut(self.index, self.chunk, self.chunk.variants[choice], next_layer)
        self.choice = choice

    def took(self, task: ReadTask) -> None:
        """This read is in its place."""
        tokens = task.tokens.stop - task.tokens.start
        for layer in range(task.layers.start, task.layers.stop):
            self.open_tokens[layer] -= tokens
            self.open_token_layers -= tokens

    def gave_back(self, tasks: list[ReadTask]) -> None:
        """These reads, the latest that were asked for, are to be asked for again."""
        self.unread.extendleft(reversed(tasks))

    def _begun(self) -> list[ReadTask]:
        """Reads of a period of which some has been asked for: that one is brought to its end as it was begun."""
        if not self.unread or self.unread[0].tokens.start == self.chunk.first_token:
            return []
        layer = self.unread[0].layers.start
        return [task for task in self.unread if task.layers.start == layer]

    def _next_layer(self) -> int:
        """The first layer that may still come in any variant one of whose periods begins there."""
        begun = self._begun()
        return self.unread[len(begun)].layers.start if len(self.unread) > len(begun) else self.layers
