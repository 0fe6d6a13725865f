"""Which stored chunk stands before which in their text."""

from array import array
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator
from dataclasses import dataclass, field

from kvstore_cluster.eviction.columns import NO_SLOT, grow
from kvstore_codec.errors import StorageError

_LARGEST_AGE = (1 << 32) - 1


class TextLinks:
    """For each slot the slot of the nearest chunk before it in its text that is on the same node. Texts that begin
    alike share their beginning, so the links make trees; `number`, the chunks before it in the text, grows along every
    link, which keeps a client that lies about its texts from making a circle. 24 bytes a slot.

    A link names a place, which a chunk that is replaced hands over to its successor. It ends when the chunk in that
    place is forgotten: the next one there is told from it by how often the place was left.
    """

    def __init__(self) -> None:
        self.number = array("I")
        self._before = array("i")  # a place
        self._before_age = array("I")
        self._ages = array("I")  # of places
        # Every slot has one place.
        self._places = array("i")
        self._slots = array("i")

    def grow(self, slot: int) -> None:
        for column in (self.number, self._before, self._before_age, self._ages):
            grow(column, slot)
        if (slots := len(self._places)) <= slot:
            self._places.extend(range(slots, slot + 1))
            self._slots.extend(range(slots, slot + 1))

    def add(self, slot: int, number: int) -> None:
        """A new chunk, linked to nothing."""
        self.grow(slot)
        self.number[slot], self._before[slot] = number, NO_SLOT

    def link(self, slot: int, before: int) -> bool:
        """False, and nothing is done, unless `before` stands before the slot by its number."""
        if self.number[before] >= self.number[slot]:
            return False
        place = self._places[before]
        self._before[slot], self._before_age[slot] = place, self._ages[place]
        return True

    def succeed(self, slot: int, old: int) -> None:
        """`slot`, to which nothing is linked, has the chunk of `old` anew: what was linked to that one is linked to it.
        It has the number and the link of `old`, too."""
        places, slots = self._places, self._slots
        places[slot], places[old] = places[old], places[slot]
        slots[places[slot]], slots[places[old]] = slot, old
        for column in (self.number, self._before, self._before_age):
            column[slot] = column[old]

    def before(self, slot: int) -> int:
        """NO_SLOT for a chunk that begins its text, or of whose text nothing before it is known here."""
        place = self._before[slot]
        if place == NO_SLOT or self._ages[place] != self._before_age[slot]:
            return NO_SLOT
        return self._slots[place]

    def all_before(self, slot: int) -> Iterator[int]:
        """Nearest first."""
        while (slot := self.before(slot)) != NO_SLOT:
            yield slot

    def forget(self, slot: int) -> None:
        """The chunk is no longer found: what is linked to it stands behind nothing from now on."""
        place = self._places[slot]
        self._before[slot] = NO_SLOT
        self._ages[place] = self._ages[place] + 1 & _LARGEST_AGE


class Followers:
    """How many of a set of chunks are linked to each slot. Four bytes a slot."""

    def __init__(self, links: TextLinks) -> None:
        self._links = links
        self._counts = array("I")

    def __getitem__(self, slot: int) -> int:
        return self._counts[slot] if slot < len(self._counts) else 0

    def add(self, slot: int) -> None:
        """Of a slot that came into the set, or was linked after that."""
        before = self._links.before(slot)
        if before != NO_SLOT:
            grow(self._counts, before)
            self._counts[before] += 1

    def remove(self, slot: int) -> None:
        before = self._links.before(slot)
        if before != NO_SLOT:
            self._counts[before] -= 1

    def succeed(self, slot: int, old: int) -> None:
        """What was linked to `old` is linked to `slot`, to which nothing was."""
        if followers := self[old]:
            grow(self._counts, slot)
            self._counts[slot], self._counts[old] = followers, 0

    def forget(self, slot: int) -> None:
        """The slot's chunk is no longer found, so nothing is linked to it."""
        if slot < len(self._counts):
            self._counts[slot] = 0

    def check_integrity(self, members: Iterable[int]) -> None:
        """Raises StorageError unless the chunks in the set, `members`, are what is counted."""
        before = map(self._links.before, members)
        found = Counter(slot for slot in before if slot != NO_SLOT)
        counted = Counter({slot: count for slot, count in enumerate(self._counts) if count})
        if found != counted:
            wrong = sorted(slot for slot in found | counted if found[slot] != counted[slot])
            raise StorageError(f"the followers of slots {wrong[:8]} are not counted right")


@dataclass(slots=True)
class Choice:
    """What is to leave, best first. Of what was proposed before it and stays, `next` are chunks whose text loses its
    end now, first chunk first, and `kept` are pinned or have something to keep behind them, last chunk first.
    `own_text`: the chunk to be spared was among what was proposed and could have gone."""

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
    """The first of `proposed` that together make `missing_bytes`, or all there are: those that may go, and of a text
    its end before its beginning. `spared`, the chunk behind which the room is wanted, stays: a text does not give its
    beginning for what follows. Everything else goes first, also what the policy values more: a policy that knows a text
    from few uses would otherwise shut out those that are new (measured on texts beyond memory: a third of the hits)."""
    choice = Choice()
    followed: dict[int, None] = {}
    going: Counter[int] = Counter()  # followers that leave, too
    for proposal in proposed:
        slot = proposal
        # With the last chunk behind it, one that was proposed before is free to go.
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
