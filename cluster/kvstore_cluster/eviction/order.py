"""In which order chunks leave a tier."""

from collections.abc import Callable, Container, Iterator
from itertools import islice

from kvstore_cluster.eviction.base import EvictionPolicy
from kvstore_cluster.eviction.columns import NO_SLOT
from kvstore_cluster.eviction.texts import Choice, Followers, TextLinks, choose

# Chunks of a text that are looked at for one that is here: a tenth of a millisecond.
_FURTHEST_BACK = 1024


class EvictionOrder:
    """A policy's order over the chunks of a tier, in which the end of a text leaves before its beginning, whatever the
    policy: a chunk is worth nothing to a prompt without the chunks before it. Used under the storage node's lock."""

    def __init__(self, policy: EvictionPolicy, links: TextLinks) -> None:
        self._policy = policy
        self._links = links
        self._followers = Followers(links)
        self._here = bytearray()

    def add(self, slot: int, *, identity: int, size_bytes: int, cost: float) -> None:
        """A chunk came into the tier. It leaves just before the one it is linked to."""
        self._policy.add(slot, identity=identity, size_bytes=size_bytes, cost=cost)
        if slot >= len(self._here):
            self._here.extend(bytes(slot + 1 - len(self._here)))
        self._here[slot] = True
        self._followers.add(slot)
        self.follow(slot)

    def linked(self, slot: int) -> None:
        """A chunk that is here was linked only now."""
        if slot in self:
            self._followers.add(slot)

    def touch(self, slot: int) -> None:
        """The chunk was used. Those of one text are touched last chunk first."""
        self._policy.touch(slot)

    def nearest(self, slot: int) -> int:
        """The slot, or of the chunks before it in its text the nearest that is here; NO_SLOT where none is near."""
        if slot in self or slot == NO_SLOT:
            return slot
        before = islice(self._links.all_before(slot), _FURTHEST_BACK)
        return next((earlier for earlier in before if earlier in self), NO_SLOT)

    def follow(self, slot: int) -> None:
        """A chunk that was just added or touched, if it is here, leaves before the one that it is linked to."""
        before = self._links.before(slot)
        if slot in self and before in self:
            self._policy.follow(slot, before)

    def report(self, slot: int, score: float) -> None:
        self._policy.report(slot, score)

    def remove(self, slot: int, *, evicted: bool) -> None:
        self._policy.remove(slot, evicted=evicted)
        self._here[slot] = False
        self._followers.remove(slot)

    def followed(self, slot: int) -> bool:
        """Whether a chunk that is here is linked to that one."""
        return self._followers[slot] > 0

    def succeed(self, slot: int, old: int) -> None:
        """`slot`, not here yet, has the place of `old` in its text."""
        self._followers.succeed(slot, old)

    def forget(self, slot: int) -> None:
        """The chunk, which is not here, is no longer found."""
        self._followers.forget(slot)

    def choose(
        self,
        missing_bytes: float,
        size_of: Callable[[int], int],
        may_go: Callable[[int], bool],
        *,
        pinned: Container[int] = (),
        spared: int = NO_SLOT,
    ) -> Choice:
        """As `texts.choose`, of what is here. What was proposed and stays is not passed over again every time: of a
        text that loses its end, the rest is proposed in the right order from now on, and what is kept, late."""
        choice = choose(
            self._policy.victims(), missing_bytes, size_of, may_go, self._links, self._followers,
            pinned=pinned, spared=spared,
        )  # fmt: skip
        for slot in choice.next:
            self.follow(slot)
        for slot in choice.kept:
            self._policy.postpone(slot)
        return choice

    def check_integrity(self) -> None:
        """Raises StorageError unless the followers of every chunk are counted right."""
        self._followers.check_integrity(self)

    def __iter__(self) -> Iterator[int]:
        """Every slot once, as the policy proposes them."""
        return self._policy.victims()

    def __contains__(self, slot: int) -> bool:
        return 0 <= slot < len(self._here) and bool(self._here[slot])

    def __len__(self) -> int:
        return len(self._policy)
