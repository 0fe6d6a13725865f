"""Finds the chunks of one lookup in slices, so that a long lookup never holds the node's lock for long."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from kvstore_cluster.catalog import ChunkCatalog
from kvstore_cluster.index import ChunkName
from kvstore_cluster.leases import Findings, LeaseId
from kvstore_cluster.reader import ChunkBytes
from kvstore_cluster.slices import SLICE_CHUNKS
from kvstore_codec.errors import ChunkNotFoundError, StorageError

SMALL_HEADERS_BYTES = 1 << 20
"""Most bytes of headers that a lookup copies with the lock held. `read_headers` reads the others without the lock."""
_HEADERS_PER_CHECK = 64
"""Headers that `read_headers` reads between two checks whether the caller still wants them."""
_OTHER_ENCODING_BYTES = 128
"""Size of a further encoding in an answer, without its header."""


@dataclass(frozen=True, slots=True)
class LookupRequest:
    """Asks for the best encoding that each of `chunks` is stored in, and for the number of other contexts that the same
    content is stored in. `encodings` lists the acceptable encodings, best first.

    `all_encodings` also asks for the other acceptable encodings that a chunk is stored in. Without `encodings` it
    accepts any encoding. With `any_context` the answer for a chunk that is not stored in its own context names a chunk
    with the same content in another context: preferably one that does not begin its text, then one in memory, then the
    most recently used one.

    The chunks that are found are leased for `lease_s` when it is positive, unless too many are leased already. The
    lookup counts as one use of them, except for a `peek`, and with `use_follows`: then `StorageNode.use` reports which
    of them are used.

    Further encodings of a chunk are left out when their headers do not fit into `max_header_bytes`. On a node that
    keeps tenants apart, only chunks of `tenant` are found.
    """

    chunks: Sequence[ChunkName]
    encodings: Sequence[str]
    lease_s: float = 0.0
    max_header_bytes: int | None = None
    with_headers: bool = True
    peek: bool = False
    all_encodings: bool = False
    any_context: bool = False
    use_follows: bool = False
    tenant: str = ""


class FoundVariant(NamedTuple):
    """One encoding that a chunk is stored in."""

    encoding: str
    size_bytes: int
    header: bytes
    on_disk: bool


class LookupAnswer(NamedTuple):
    """The answer for one chunk. `encoding` is None when the chunk is not stored on this node in an acceptable
    encoding."""

    encoding: str | None
    size_bytes: int
    header: bytes
    other_contexts: int
    on_disk: bool = False
    """Whether the chunk is only on disk, so that a read of it uses the disk."""
    others: Sequence[FoundVariant] = ()
    """Further encodings that the chunk is stored in. Empty unless the request has `all_encodings`."""
    prefix_id: bytes = b""
    """Context of the chunk that was found, when it differs from the requested one."""


@dataclass(frozen=True, slots=True)
class LookupResult:
    """One answer per requested chunk, in order. `lease_id` is None when nothing was leased."""

    answers: list[LookupAnswer]
    lease_id: LeaseId | None


class ChunkSearch:
    """Finds the chunks of one lookup. A chunk that expired before unix time `now_s` is not found. The caller calls
    `find` for SLICE_CHUNKS chunks at a time, and then `read_headers`. A caller that stops earlier calls `release`."""

    def __init__(
        self, catalog: ChunkCatalog, stored: ChunkBytes, request: LookupRequest, now_s: float
    ) -> None:
        self._catalog = catalog
        self._stored = stored
        self._request = request
        self._now_s = now_s
        self.header_bytes = 0
        """Total size of the headers in all answers so far, including those that `read_headers` has still to read."""
        # (number of the answer, place in it, slot); the slots are acquired
        self._headers_to_read: list[tuple[int, int, int]] = []
        self.answers: list[LookupAnswer] = []
        self.hits: list[int] = []
        """Slots of all variants found, including further encodings, in the order of the chunks."""
        self.missed = 0
        self.approximate: set[int] = set()
        """Numbers of the chunks that were found only in another context."""
        self.tenant = request.tenant

    def find(self, begin: int) -> list[int]:
        """Adds the answers for the next SLICE_CHUNKS chunks from number `begin`, and returns the slots that were found.
        Call with the lock held. Raises StorageError when the headers of all answers exceed `max_header_bytes`."""
        catalog, index, now_s, request = self._catalog, self._catalog.index, self._now_s, self._request
        anything = request.all_encodings and not request.encodings
        preference = index.any_encoding if anything else index.preference(request.encodings)
        # A lookup of a thousand chunks should take a millisecond, so attributes are read once, before the loop.
        best, encoding_of, extents = index.best, index.encoding, index.extent
        sizes, header_sizes = index.size_bytes, index.header_bytes
        contents = index.contents(request.tenant)
        answers, hits, first_hit = self.answers, self.hits, len(self.hits)
        with_headers, max_header_bytes = request.with_headers, request.max_header_bytes
        # Slot by content id. A search examines up to 512 contexts, and a lookup may name a content thousands of times.
        other_contexts: dict[bytes, int] = {}
        for chunk in request.chunks[begin : begin + SLICE_CHUNKS]:
            slot, contexts = best(contents, chunk, preference, now_s)
            other_context = b""
            if slot < 0 and request.any_context and contexts:
                content_id = chunk.content_id
                if content_id not in other_contexts:
                    catalog.flush_touches()  # the search prefers the most recently used
                    other_contexts[content_id] = index.another_context(contents, chunk, preference, now_s)
                slot = other_contexts[content_id]
                if slot >= 0:
                    chunk = index.chunk_id(slot)
                    other_context = chunk.prefix_id
                    self.approximate.add(len(answers))
            if slot < 0:
                self.missed += 1
                answers.append(LookupAnswer(None, 0, b"", contexts))
                continue
            hits.append(slot)
            header = b""
            if with_headers:
                self.header_bytes += header_sizes[slot]
                header = self._header(slot, len(answers), 0)
            others: Sequence[FoundVariant] = ()
            if request.all_encodings:
                slots = index.others(contents, chunk, slot, preference, now_s)
                others = self._others(slot, slots)
                hits += slots[: len(others)]
            if max_header_bytes is not None and self.header_bytes > max_header_bytes:
                raise StorageError(
                    f"the headers of the first {len(answers) + 1} of {len(request.chunks)} chunks exceed "
                    f"{max_header_bytes} bytes; look fewer chunks up at a time"
                )
            on_disk = extents[slot] is None
            answers.append(
                LookupAnswer(encoding_of(slot), sizes[slot], header, contexts, on_disk, others, other_context)
            )
        return hits[first_hit:]

    def findings(self, first_hit: int) -> Findings[int]:
        """The chunks found from position `first_hit` of `hits` on. Call before `read_headers`. Needs no lock."""
        if self._request.all_encodings:
            numbers = [
                n for n, answer in enumerate(self.answers) if answer.encoding for _ in (0, *answer.others)
            ]
        else:
            numbers = [n for n, answer in enumerate(self.answers) if answer.encoding]
        leased = numbers[first_hit:]
        return Findings(self.hits[first_hit:], leased, self.approximate & set(leased))

    def read_headers(self, proceed: Callable[[int], object]) -> None:
        """Reads the headers that `find` left out, and removes variants that the disk has lost from their answers. May
        block; call without the lock. Calls `proceed` with `header_bytes` before each batch; an exception of `proceed`
        ends the reading."""
        while self._headers_to_read:
            proceed(self.header_bytes)
            batch = self._headers_to_read[-_HEADERS_PER_CHECK:]
            with self._catalog.lock:
                known = {slot: self._stored.known_header(slot) for _, _, slot in batch}
            try:
                # Last to first, because removing a lost encoding shifts the places of the later ones.
                for number, place, slot in reversed(batch):
                    self.answers[number] = self._with_header_of(
                        slot, self.answers[number], place, known[slot]
                    )
            finally:
                del self._headers_to_read[-_HEADERS_PER_CHECK:]
                with self._catalog.lock:
                    for _, _, slot in batch:
                        self._catalog.release(slot)

    def release(self) -> None:
        """Releases the chunks whose headers have not been read. Call with the lock held."""
        while self._headers_to_read:
            self._catalog.release(self._headers_to_read.pop()[2])

    def _header(self, slot: int, number: int, place: int) -> bytes:
        """The header of the chunk. Empty when `read_headers` is to read it; the slot is acquired until then."""
        header = None
        if self.header_bytes <= SMALL_HEADERS_BYTES:
            header = self._stored.known_header(slot)
        if header is None:
            self._catalog.acquire(slot)
            self._headers_to_read.append((number, place, slot))
        return header or b""

    def _others(self, slot: int, slots: Sequence[int]) -> list[FoundVariant]:
        """The further encodings of the chunk in `slot`. Empty when their headers would leave too little room for the
        later chunks of the request: the best encoding of every chunk comes first."""
        index, request = self._catalog.index, self._request
        own_bytes = index.header_bytes[slot] if request.with_headers else 0
        others_bytes = len(slots) * _OTHER_ENCODING_BYTES
        others_bytes += sum(index.header_bytes[other] for other in slots) if request.with_headers else 0
        if request.max_header_bytes is not None:
            behind = len(request.chunks) - len(self.answers) - 1
            if self.header_bytes + behind * own_bytes + others_bytes > request.max_header_bytes:
                return []
        self.header_bytes += others_bytes
        return [
            FoundVariant(
                index.encoding(other),
                index.size_bytes[other],
                self._header(other, len(self.answers), place) if request.with_headers else b"",
                index.extent[other] is None,
            )
            for place, other in enumerate(slots, 1)
        ]

    def _with_header_of(
        self, slot: int, answer: LookupAnswer, place: int, header: bytes | None
    ) -> LookupAnswer:
        """The answer with the header of one of its variants: of the best one at `place` 0, or of a further encoding
        from `place` 1 on. Reads the header when it is None. Removes the variant when the disk has lost it; the first
        further encoding then replaces a lost best one."""
        others = list(answer.others)
        try:
            header = self._stored.header(slot) if header is None else header
        except ChunkNotFoundError:
            if place:
                del others[place - 1]
                return answer._replace(others=others)
            if not others:
                return LookupAnswer(None, 0, b"", answer.other_contexts)
            first = others.pop(0)
            return answer._replace(
                encoding=first.encoding,
                size_bytes=first.size_bytes,
                header=first.header,
                on_disk=first.on_disk,
                others=others,
            )
        if not place:
            return answer._replace(header=header)
        others[place - 1] = others[place - 1]._replace(header=header)
        return answer._replace(others=others)
