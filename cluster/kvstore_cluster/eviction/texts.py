"""Links from stored chunks to their predecessors in their text, and the choice of victims that respects them."""

from array import array
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator
from dataclasses import dataclass, field

from kvstore_cluster.eviction.columns import NO_SLOT, grow
from kvstore_codec.errors import StorageError

_LARGEST_AGE = (1 << 32) - 1


class TextLinks:
    """A link from each slot to its predecessor: the nearest earlier chunk of its text on the same node. 24 bytes per
    slot.

    Texts with the same beginning share its chunks, so the links form trees. `number`, the number of earlier chunks in
    the text, must be larger than the predecessor's. False claims of a client therefore cannot create a cycle.

    A link points to a place rather than a slot. A chunk that is replaced passes its place to its replacement. A link
    ends when the chunk in its place is forgotten: the place then gets a new age, which differs from the link's.
    """

    def __init__(self) -> None:
        self.number = array("I")
        self._before = array("i")  # the place of the predecessor, by slot
        self._before_age = array("I")
        self._ages = array("I")  # how many chunks of a place were forgotten, by place
        # A one-to-one mapping between slots and places.
        self._places = array("i")
        self._slots = array("i")

    def grow(self, slot: int) -> None:
        for column in (self.number, self._before, self._before_age, self._ages):
            grow(column, slot)
        if (slots := len(self._places)) <= slot:
            self._places.extend(range(slots, slot + 1))
            self._slots.extend(range(slots, slot + 1))

    def add(self, slot: int, number: int) -> None:
        """Adds a chunk without a predecessor."""
        self.grow(slot)
        self.number[slot], self._before[slot] = number, NO_SLOT

    def link(self, slot: int, before: int) -> bool:
        """Makes `before` the predecessor of `slot`. Does nothing and returns False unless its number is less."""
        if self.number[before] >= self.number[slot]:
            return False
        place = self._places[before]
        self._before[slot], self._before_age[slot] = place, self._ages[place]
        return True

    def succeed(self, slot: int, old: int) -> None:
        """Replaces `old` by `slot`, which has no followers yet. `slot` gets the followers, number and predecessor of
        `old`."""
        places, slots = self._places, self._slots
        places[slot], places[old] = places[old], places[slot]
        slots[places[slot]], slots[places[old]] = slot, old
        for column in (self.number, self._before, self._before_age):
            column[slot] = column[old]

    def before(self, slot: int) -> int:
        """Slot of the predecessor. NO_SLOT for the first chunk of a text, or when no earlier chunk is known."""
        place = self._before[slot]
        if place == NO_SLOT or self._ages[place] != self._before_age[slot]:
            return NO_SLOT
        return self._slots[place]

    def all_before(self, slot: int) -> Iterator[int]:
        """Yields all earlier chunks of the text, nearest first."""
        while (slot := self.before(slot)) != NO_SLOT:
            yield slot

    def forget(self, slot: int) -> None:
        """Removes the links from and to a chunk that was removed from the index."""
        place = self._places[slot]
        self._before[slot] = NO_SLOT
        self._ages[place] = self._ages[place] + 1 & _LARGEST_AGE


class Followers:
    """For each slot, the number of chunks of a set that directly follow it in their text. 4 bytes per slot."""

    def __init__(self, links: TextLinks) -> None:
        self._links = links
        self._counts = array("I")

    def __getitem__(self, slot: int) -> int:
        return self._counts[slot] if slot < len(self._counts) else 0

    def add(self, slot: int) -> None:
        """Counts a chunk that was added to the set, or linked after that."""
        before = self._links.before(slot)
        if before != NO_SLOT:
            grow(self._counts, before)
            self._counts[before] += 1

    def remove(self, slot: int) -> None:
        before = self._links.before(slot)
        if before != NO_SLOT:
            self._counts[before] -= 1

    def succeed(self, slot: int, old: int) -> None:
        """Moves the count of `old` to `slot`, which has no followers yet."""
        if followers := self[old]:
            grow(self._counts, slot)
            self._counts[slot], self._counts[old] = followers, 0

    def forget(self, slot: int) -> None:
        """Clears the count of a chunk that was removed from the index."""
        if slot < len(self._counts):
            self._counts[slot] = 0

    def check_integrity(self, members: Iterable[int]) -> None:
        """Raises StorageError unless the counts match `members`, the chunks of the set."""
        before = map(self._links.before, members)
        found = Counter(slot for slot in before if slot != NO_SLOT)
        counted = Counter({slot: count for slot, count in enumerate(self._counts) if count})
        if found != counted:
            wrong = sorted(slot for slot in found | counted if found[slot] != counted[slot])
            raise StorageError(f"the followers of slots {wrong[:8]} are not counted right")


@dataclass(slots=True)
class Choice:
    """A choice of victims, best first, and the proposed chunks that stay. `next` are chunks that become the end of
    their text, and the chunks before them, first chunk first. `kept` are chunks that are pinned, spared, or followed by
    a chunk that stays, last chunk first. `own_text` says that the spared chunk was proposed."""

    victims: list[int] = field(default_factory=list)
    next: list[int] = field(default_factory=list)
    kept: list[int] = field(default_factory=list)
    own_text: bool = False


def choose(
    proposed: Iterable[int],
    missing_bytes: float,
    size_of: Callable[[int], int],
    may_go: Callable[[int], bool],
    links: TextLinks,
    followers: Followers,
    *,
    pinned: Container[int] = (),
    spared: int = NO_SLOT,
) -> Choice:
    """Chooses the first of the `proposed` slots that together free `missing_bytes`, or all possible ones if they free
    less. Chooses only slots for which `may_go` is true, and the end of a text before its beginning.

    `spared` is the predecessor of the chunk that needs the room. It is never chosen, because a text must not lose its
    beginning to its own continuation. All other chunks may be chosen, even ones that the policy values more than the
    new chunk. Otherwise texts with more uses would keep new texts out: measured on texts larger than memory, that cost
    a third of the hits."""
    choice = Choice()
    followed: dict[int, None] = {}
    going: Counter[int] = Counter()  # number of followers among the victims, by slot
    for proposal in proposed:
        slot = proposal
        # A slot proposed earlier may go once its last follower is a victim.
        while slot != NO_SLOT:
            if followers[slot] > going[slot]:
                followed[slot] = None
                break
            if slot == spared:
                choice.own_text = True
                choice.kept.append(slot)
                break
            if not may_go(slot):
                if slot in pinned:
                    choice.kept.append(slot)
                break
            choice.victims.append(slot)
            missing_bytes -= size_of(slot)
            if missing_bytes <= 0:
                break
            slot = links.before(slot)
            going[slot] += 1
            if slot not in followed or followers[slot] > going[slot]:
                break
            del followed[slot]
        if missing_bytes <= 0:
            break
    for slot in choice.victims:
        while (slot := links.before(slot)) in followed:
            del followed[slot]
            choice.next.append(slot)
    choice.next.sort(key=links.number.__getitem__)
    choice.kept += sorted(followed, key=links.number.__getitem__, reverse=True)
    return choice
