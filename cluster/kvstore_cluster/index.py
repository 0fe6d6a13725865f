"""What a storage node holds: content -> contexts -> variants, each a slot in columns of plain numbers.

A node indexes millions of chunks, most of them on its disk, so a chunk costs about 250 bytes here and no Python object
but its content id, its number, and its extent while it is in memory.
"""

from array import array
from collections.abc import Iterator, Mapping, Sequence
from itertools import compress, islice
from typing import Protocol

from kvstore_cluster.arena import Extent
from kvstore_cluster.disk import Location, RecordMeta
from kvstore_cluster.eviction import TextLinks
from kvstore_cluster.eviction.columns import NO_SLOT
from kvstore_cluster.expiry import ExpiryQueue
from kvstore_cluster.names import ChunkNames, Description
from kvstore_codec.identity import ROOT_PREFIX, ChunkId, ContentId, PrefixId, prefix_id

NOWHERE = Location(-1)
# No model has so much KV in 256 tokens: who announces more is mistaken, or wants the memory.
MAX_CHUNK_BYTES = (1 << 30) - 1
_ID_BYTES = 32
_NOT_WANTED = 1 << 30
# Contexts of one content that are looked at, and of those that will do, among which one is chosen: a text that all
# quotes has thousands.
_MOST_CONTEXTS, _MOST_USABLE = 512, 16
_NO_SLOTS: tuple[int, ...] = ()


class ChunkName(Protocol):
    """A ChunkId, or what a client sent in its place: ids of any length, since no other than a ChunkId's are stored."""

    @property
    def content_id(self) -> bytes: ...
    @property
    def prefix_id(self) -> bytes: ...


class ChunkIndex:
    """Not thread-safe: used under the storage node's lock. Finding a chunk takes a constant number of dictionary
    look-ups, however many contexts its content has.

    The columns are indexed by slot. `extent` is where the chunk lies in memory and `location` where on disk; None and
    NOWHERE say that it does not.
    """

    def __init__(self) -> None:
        # Nearly every content has one context in one encoding: then there is only its slot. Several contexts are in
        # the order of their last use.
        self._contents: dict[bytes, int | dict[bytes, list[int]]] = {}
        self._ids: list[ContentId] = []
        self._prefixes = bytearray()
        self._free: list[int] = []
        self._linked = bytearray()
        self._count = 0
        self._names = ChunkNames()
        self._encoding, self._calibration, self._tenant = array("H"), array("H"), array("H")
        self._expires_at_s = array("d")
        self.expiries = ExpiryQueue(self._expires_at_s)
        """Of linked slots."""
        self._cost = array("f")
        self.size_bytes, self.header_bytes = array("I"), array("I")
        self.location = array("q")
        self.extent: list[Extent | None] = []
        self.texts = TextLinks()

    def add(self, meta: RecordMeta, *, extent: Extent | None = None, location: Location = NOWHERE) -> int:
        """The slot of a new variant. Raises StorageError when it cannot be described, as `admit`."""
        encoding, calibration, tenant = self.admit(meta)
        slot = self._free.pop() if self._free else self._grow()
        content_id, prefix_id = meta.chunk_id.content_id, meta.chunk_id.prefix_id
        self._prefixes[slot * _ID_BYTES : (slot + 1) * _ID_BYTES] = prefix_id
        self._encoding[slot], self._calibration[slot], self._tenant[slot] = encoding, calibration, tenant
        self._expires_at_s[slot], self._cost[slot] = meta.expires_at_s, meta.cost
        self.size_bytes[slot], self.header_bytes[slot] = meta.size_bytes, meta.header_bytes
        self.location[slot], self.extent[slot] = location, extent
        self.texts.add(slot, meta.number)
        found = self._contents.get(content_id)
        if found is None:
            self._contents[content_id] = slot
            self._ids[slot] = content_id
        else:
            if isinstance(found, int):
                found = {self._prefix_id(found): [found]}
                self._contents[content_id] = found
            # Not the caller's equal bytes, so that there is one copy of them.
            self._ids[slot] = self._ids[next(reversed(found.values()))[0]]
            found.setdefault(prefix_id, []).append(slot)
        self._linked[slot] = True
        if meta.expires_at_s > 0:
            self.expiries.add(slot)
        self._count += 1
        return slot

    def admit(self, meta: RecordMeta) -> Description:
        """Makes sure that `add` will not fail, until `dismiss`. Raises StorageError when there are too many tenants,
        encodings or calibrations, and OverQuotaError when there are of this tenant."""
        return self._names.acquire(meta.encoding, meta.calibration, meta.tenant)

    def dismiss(self, description: Description) -> None:
        """Ends what `admit` began."""
        self._names.release(description)

    def unlink(self, slot: int) -> None:
        """The variant is no longer found; its columns stay until `free`."""
        content_id = self._ids[slot]
        found = self._contents[content_id]
        if isinstance(found, int):
            del self._contents[content_id]
        else:
            prefix_id = self._prefix_id(slot)
            found[prefix_id].remove(slot)
            if not found[prefix_id]:
                del found[prefix_id]
            if len(found) == 1:
                (left,) = found.values()
                if len(left) == 1:
                    self._contents[content_id] = left[0]
        self._linked[slot] = False
        if self._expires_at_s[slot] > 0:
            self.expiries.remove(slot)
        self._count -= 1
        self.texts.forget(slot)

    def free(self, slot: int) -> None:
        """The slot, unlinked, may name another variant from now on."""
        self._names.release(Description(self._encoding[slot], self._calibration[slot], self._tenant[slot]))
        self._ids[slot] = ContentId(b"")
        self.extent[slot] = None
        self.location[slot] = NOWHERE
        self._expires_at_s[slot] = 0.0
        self._free.append(slot)

    def variants(self, chunk_id: ChunkId) -> Sequence[int]:
        """The slots of one exact chunk, one for each encoding. The caller must not change it."""
        found = self._contents.get(chunk_id.content_id)
        if found is None:
            return _NO_SLOTS
        if isinstance(found, int):
            return (found,) if self._prefix_id(found) == chunk_id.prefix_id else _NO_SLOTS
        return found.get(chunk_id.prefix_id, _NO_SLOTS)

    def stands_behind(self, tenant: str, number: int, behind: Sequence[ChunkId], encoding: str) -> int:
        """The slot that a variant of a text's chunk is to be linked to: of the first of `behind` that is here, stored
        by the same tenant and by its number an earlier one; the same encoding is preferred. NO_SLOT: there is none."""
        for chunk_id in behind:
            slots = [
                slot
                for slot in self.variants(chunk_id)
                if self.tenant(slot) == tenant and self.texts.number[slot] < number
            ]
            if slots:
                return next((slot for slot in slots if self.encoding(slot) == encoding), slots[0])
        return NO_SLOT

    def link_behind(self, slot: int, before: int) -> bool:
        """The chunk in `slot` stands behind `before` in their text from now on. False, and nothing is done, where that
        one is another tenant's or, by its number, no earlier one."""
        return self._tenant[slot] == self._tenant[before] and self.texts.link(slot, before)

    def find(self, chunk_id: ChunkId, encoding: str) -> int | None:
        """The slot of a variant."""
        for slot in self.variants(chunk_id):
            if self.encoding(slot) == encoding:
                return slot
        return None

    def find_alive(self, chunk_id: ChunkId, encoding: str, now_s: float) -> int | None:
        """As `find`, but for a variant whose time is over."""
        slot = self.find(chunk_id, encoding)
        return slot if slot is not None and self.is_alive(slot, now_s) else None

    def is_alive(self, slot: int, now_s: float) -> bool:
        """Whether the variant's time is not over."""
        return not 0 < self._expires_at_s[slot] <= now_s

    @property
    def any_encoding(self) -> Mapping[int, int]:
        """The `preference` of whom every encoding will do."""
        return self._names.all_encodings

    def preference(self, encodings: Sequence[str]) -> dict[int, int]:
        """What `best` and its like want to know of `encodings`, best first."""
        numbers = map(self._names.encoding_number, encodings)
        return {number: rank for rank, number in reversed([*enumerate(numbers)]) if number is not None}

    def best(self, chunk_id: ChunkName, preference: Mapping[int, int], now_s: float) -> tuple[int, int]:
        """The slot of the exact chunk in the encoding preferred most, -1 when there is none that has not expired; and
        how many other contexts hold the same content."""
        found = self._contents.get(chunk_id.content_id)
        if found is None:
            return -1, 0
        if isinstance(found, int):  # as of most chunks: without a list and a call for each
            start = found * _ID_BYTES
            if self._prefixes[start : start + _ID_BYTES] != chunk_id.prefix_id:
                return -1, 1
            wanted = self._encoding[found] in preference and not 0 < self._expires_at_s[found] <= now_s
            return (found if wanted else -1), 0
        slots = found.get(chunk_id.prefix_id, [])
        return self._preferred(slots, preference, now_s), len(found) - bool(slots)

    def another_context(self, chunk_id: ChunkName, preference: Mapping[int, int], now_s: float) -> int:
        """As `best`, of another context of the same content: one that does not begin its text, if there is any; of
        those one in memory; of those the one used last."""
        found = self._contents.get(chunk_id.content_id)
        if found is None:
            return -1
        if isinstance(found, int):
            return self._preferred((found,), preference, now_s)
        begins_text = prefix_id(ROOT_PREFIX, ContentId(chunk_id.content_id))
        best, best_rank, usable = -1, _NOT_WANTED, 0
        for context, slots in islice(reversed(found.items()), _MOST_CONTEXTS):
            slot = self._preferred(slots, preference, now_s)
            if slot < 0:
                continue
            rank = 2 * (context == begins_text) + (self.extent[slot] is None)
            if rank < best_rank:
                best, best_rank = slot, rank
            usable += 1
            if best_rank == 0 or usable == _MOST_USABLE:
                break
        return best

    def used(self, slot: int) -> None:
        """Its context is the one of its content that was used last."""
        found = self._contents[self._ids[slot]]
        if not isinstance(found, int):
            context = self._prefix_id(slot)
            found[context] = found.pop(context)

    def others(
        self, chunk_id: ChunkName, best: int, preference: Mapping[int, int], now_s: float
    ) -> Sequence[int]:
        """The slots of the exact chunk, but for the `best`, in the preferred encodings, in their order."""
        found = self._contents.get(chunk_id.content_id)
        if not isinstance(found, dict):
            return _NO_SLOTS
        others = [
            slot
            for slot in found.get(PrefixId(chunk_id.prefix_id), _NO_SLOTS)
            if slot != best
            and self._encoding[slot] in preference
            and not 0 < self._expires_at_s[slot] <= now_s
        ]
        return sorted(others, key=lambda slot: preference[self._encoding[slot]])

    def chunk_id(self, slot: int) -> ChunkId:
        return ChunkId(self._ids[slot], self._prefix_id(slot))

    def content_id(self, slot: int) -> ContentId:
        return self._ids[slot]

    def encoding(self, slot: int) -> str:
        return self._names.encodings[self._encoding[slot]]

    def calibration(self, slot: int) -> bytes | None:
        return self._names.calibrations[self._calibration[slot]]

    def tenant(self, slot: int) -> str:
        return self._names.tenants[self._tenant[slot]]

    def cost(self, slot: int) -> float:
        return self._cost[slot]

    def identity(self, slot: int) -> int:
        """64 bits that name the variant wherever it is stored."""
        prefix = int.from_bytes(self._prefixes[slot * _ID_BYTES : slot * _ID_BYTES + 8], "little")
        return prefix ^ self._encoding[slot]

    def expires_at_s(self, slot: int) -> float:
        """Unix time; 0: never."""
        return self._expires_at_s[slot]

    def meta(self, slot: int) -> RecordMeta:
        before = self.texts.before(slot)
        return RecordMeta(
            self.chunk_id(slot),
            self.encoding(slot),
            self.size_bytes[slot],
            self.header_bytes[slot],
            calibration=self.calibration(slot),
            tenant=self.tenant(slot),
            cost=self.cost(slot),
            expires_at_s=self.expires_at_s(slot),
            number=self.texts.number[slot],
            behind=self.chunk_id(before) if before != NO_SLOT else None,
        )

    def is_linked(self, slot: int) -> bool:
        """Whether the variant is still found by its name."""
        return bool(self._linked[slot])

    def linked(self, slots: Sequence[int]) -> Iterator[int]:
        """Those of `slots` that are linked: for a thousand, in a third of the time that as many calls take."""
        return compress(slots, map(self._linked.__getitem__, slots))

    @property
    def slots(self) -> int:
        """Every slot is below it."""
        return len(self._ids)

    def __iter__(self) -> Iterator[int]:
        """Every linked slot, in order."""
        return (slot for slot, linked in enumerate(self._linked) if linked)

    def __len__(self) -> int:
        return self._count

    def _preferred(self, slots: Sequence[int], preference: Mapping[int, int], now_s: float) -> int:
        best, best_rank = -1, _NOT_WANTED
        for slot in slots:
            rank = preference.get(self._encoding[slot], _NOT_WANTED)
            if rank < best_rank and not 0 < self._expires_at_s[slot] <= now_s:
                best, best_rank = slot, rank
        return best

    def _grow(self) -> int:
        self._ids.append(ContentId(b""))
        self._prefixes.extend(bytes(_ID_BYTES))
        self._linked.append(False)
        for column in (
            self._encoding,
            self._calibration,
            self._tenant,
            self._expires_at_s,
            self._cost,
            self.size_bytes,
            self.header_bytes,
        ):
            column.append(0)
        self.location.append(NOWHERE)
        self.extent.append(None)
        return len(self._ids) - 1

    def _prefix_id(self, slot: int) -> PrefixId:
        return PrefixId(bytes(self._prefixes[slot * _ID_BYTES : (slot + 1) * _ID_BYTES]))
