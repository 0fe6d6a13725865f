"""The order in which chunks leave a tier."""

from collections.abc import Callable, Container, Iterator
from itertools import islice

from kvstore_cluster.eviction.base import EvictionPolicy
from kvstore_cluster.eviction.columns import NO_SLOT
from kvstore_cluster.eviction.texts import Choice, Followers, TextLinks, choose

# Limit of the earlier chunks of a text that `nearest` examines. 1,024 take 0.1 ms.
_FURTHEST_BACK = 1024


class EvictionOrder:
    """The order of an eviction policy over the chunks of a tier, changed so that the end of a text leaves before its
    beginning: a chunk is worth nothing to a prompt without the chunks before it. Not thread-safe: used with the storage
    node's lock held."""

    def __init__(self, policy: EvictionPolicy, links: TextLinks) -> None:
        self._policy = policy
        self._links = links
        self._followers = Followers(links)
        self._here = bytearray()

    def add(self, slot: int, *, identity: int, size_bytes: int, cost: float) -> None:
        """Adds a chunk that came into the tier. It leaves just before its predecessor in the text."""
        self._policy.add(slot, identity=identity, size_bytes=size_bytes, cost=cost)
        if slot >= len(self._here):
            self._here.extend(bytes(slot + 1 - len(self._here)))
        self._here[slot] = True
        self._followers.add(slot)
        self.follow(slot)

    def linked(self, slot: int) -> None:
        """Records a text link that was added after the chunk came into the tier."""
        if slot in self:
            self._followers.add(slot)

    def touch(self, slot: int) -> None:
        """Records a use of the chunk. The caller touches the chunks of one text last chunk first."""
        self._policy.touch(slot)

    def nearest(self, slot: int) -> int:
        """The slot itself if it is in this tier, or the nearest earlier chunk of its text that is. NO_SLOT when there
        is none within the last 1,024 chunks."""
        if slot in self or slot == NO_SLOT:
            return slot
        before = islice(self._links.all_before(slot), _FURTHEST_BACK)
        return next((earlier for earlier in before if earlier in self), NO_SLOT)

    def follow(self, slot: int) -> None:
        """Moves a chunk that was just added or touched before its predecessor in the text, if both are in this tier."""
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
        """Whether a chunk in this tier directly follows `slot` in its text."""
        return self._followers[slot] > 0

    def succeed(self, slot: int, old: int) -> None:
        """Gives the followers of `old` in its text to `slot`, which is not in this tier yet."""
        self._followers.succeed(slot, old)

    def forget(self, slot: int) -> None:
        """Clears the count of followers of a removed chunk."""
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
        """Chooses victims in this tier, as `texts.choose` defines. Reorders the proposed chunks that stay, so that the
        next call does not examine all of them again: chunks whose text lost its end move behind one another in text
        order, and kept chunks move to the end."""
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
        """Raises StorageError unless the followers of every chunk are counted correctly."""
        self._followers.check_integrity(self)

    def __iter__(self) -> Iterator[int]:
        """Iterates over every slot once, in the order of the policy."""
        return self._policy.victims()

    def __contains__(self, slot: int) -> bool:
        return 0 <= slot < len(self._here) and bool(self._here[slot])

    def __len__(self) -> int:
        return len(self._policy)
