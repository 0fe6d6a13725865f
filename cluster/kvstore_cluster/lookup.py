"""Finding the chunks of one lookup, slice by slice, so that a long lookup never keeps the node's lock for long."""

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
"""Headers that are copied as their chunks are found; those beyond are read when nobody waits for the lock."""
_HEADERS_PER_CHECK = 64
"""Headers that are read between two looks at whether anybody still wants them."""
_OTHER_ENCODING_BYTES = 128
"""Of an answer, for each further encoding, besides its header."""


@dataclass(frozen=True, slots=True)
class LookupRequest:
    """Asks for each of `chunks` in which of `encodings`, best first, it is stored, and how many other contexts hold the
    same content.

    `all_encodings` asks also in which others of them it is stored, or of any when there are none. With `any_context` a
    chunk that is not stored in its own context is answered with another one of its content: one that does not begin its
    text if there is any, of those one in memory, of those the one used last.

    What is found is leased for `lease_s` when positive, unless too much is leased already. It counts as one use of it,
    unless this is a `peek`, or `use_follows`: then `StorageNode.use` says what of it is used.

    Further encodings of later chunks are left out where their headers would not fit into `max_header_bytes`.
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


class FoundVariant(NamedTuple):
    """One encoding that a chunk is stored in."""

    encoding: str
    size_bytes: int
    header: bytes
    on_disk: bool


class LookupAnswer(NamedTuple):
    """`encoding` is None when the chunk is not here in an acceptable encoding: the exact one, unless `prefix_id` says
    otherwise."""

    encoding: str | None
    size_bytes: int
    header: bytes
    other_contexts: int
    on_disk: bool = False
    """Not in memory: a read comes from the disk."""
    others: Sequence[FoundVariant] = ()
    """The same chunk in further encodings, if they were asked for."""
    prefix_id: bytes = b""
    """The context that all this is about, where it is another than the one that was asked for."""


@dataclass(frozen=True, slots=True)
class LookupResult:
    """One answer per asked chunk, in order; `lease_id` is None when nothing was leased."""

    answers: list[LookupAnswer]
    lease_id: LeaseId | None


class ChunkSearch:
    """The answers to one lookup, as far as they are known at unix time `now_s`. `find` is called for SLICE_CHUNKS
    chunks at a time, and `read_headers` at the end. A caller that stops before that calls `release`."""

    def __init__(
        self, catalog: ChunkCatalog, stored: ChunkBytes, request: LookupRequest, now_s: float
    ) -> None:
        self._catalog = catalog
        self._stored = stored
        self._request = request
        self._now_s = now_s
        self.header_bytes = 0
        """Of all answers so far, those included that `read_headers` is to read."""
        # (number of the answer, place in it, slot), of slots that are acquired
        self._headers_to_read: list[tuple[int, int, int]] = []
        self.answers: list[LookupAnswer] = []
        self.hits: list[int] = []
        """Slots of everything found, further encodings included, in the order of the chunks."""
        self.missed = 0
        self.approximate: set[int] = set()
        """Numbers of the chunks found in another context only."""

    def find(self, begin: int) -> list[int]:
        """Answers for the chunks from number `begin` on, and returns the slots of what was found. Lock held. Raises
        StorageError when the headers of all answers have more than `max_header_bytes`."""
        catalog, index, now_s, request = self._catalog, self._catalog.index, self._now_s, self._request
        anything = request.all_encodings and not request.encodings
        preference = index.any_encoding if anything else index.preference(request.encodings)
        # A thousand chunks are to be found in a millisecond: what the loop needs is looked up once.
        best, encoding_of, extents = index.best, index.encoding, index.extent
        sizes, header_sizes = index.size_bytes, index.header_bytes
        answers, hits, first_hit = self.answers, self.hits, len(self.hits)
        with_headers, max_header_bytes = request.with_headers, request.max_header_bytes
        # By content. Finding it looks at up to 512 contexts, and a lookup may name one content thousands of times.
        other_contexts: dict[bytes, int] = {}
        for chunk in request.chunks[begin : begin + SLICE_CHUNKS]:
            slot, contexts = best(chunk, preference, now_s)
            other_context = b""
            if slot < 0 and request.any_context and contexts:
                content_id = chunk.content_id
                if content_id not in other_contexts:
                    catalog.flush_touches()  # which of them was used last counts
                    other_contexts[content_id] = index.another_context(chunk, preference, now_s)
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
                slots = index.others(chunk, slot, preference, now_s)
                others = self._others(slot, slots)
                hits += slots[: len(others)]
            if max_header_bytes is not None and self.header_bytes > max_header_bytes:
                raise StorageError(
                    f"the headers of the first {len(answers) + 1} of {len(request.chunks)} chunks have more "
                    f"than {max_header_bytes} bytes; look fewer chunks up at a time"
                )
            on_disk = extents[slot] is None
            answers.append(
                LookupAnswer(encoding_of(slot), sizes[slot], header, contexts, on_disk, others, other_context)
            )
        return hits[first_hit:]

    def findings(self, first_hit: int) -> Findings[int]:
        """What was found, from that one of `hits` on; before `read_headers`. Lock not needed."""
        if self._request.all_encodings:
            numbers = [
                n for n, answer in enumerate(self.answers) if answer.encoding for _ in (0, *answer.others)
            ]
        else:
            numbers = [n for n, answer in enumerate(self.answers) if answer.encoding]
        leased = numbers[first_hit:]
        return Findings(self.hits[first_hit:], leased, self.approximate & set(leased))

    def read_headers(self, proceed: Callable[[int], object]) -> None:
        """Reads the headers that `find` left out. Lock not held; may block. What the disk has lost is left out of its
        answer. Calls `proceed` with `header_bytes` before and now and then, and passes on what it raises."""
        while self._headers_to_read:
            proceed(self.header_bytes)
            batch = self._headers_to_read[-_HEADERS_PER_CHECK:]
            with self._catalog.lock:
                known = {slot: self._stored.known_header(slot) for _, _, slot in batch}
            try:
                # From the back: an answer whose other encodings were lost has them in order until then.
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
        """Releases the chunks whose headers `read_headers` would have read. Lock held."""
        while self._headers_to_read:
            self._catalog.release(self._headers_to_read.pop()[2])

    def _header(self, slot: int, number: int, place: int) -> bytes:
        """Empty where it is read later; then the slot is acquired."""
        header = None
        if self.header_bytes <= SMALL_HEADERS_BYTES:
            header = self._stored.known_header(slot)
        if header is None:
            self._catalog.acquire(slot)
            self._headers_to_read.append((number, place, slot))
        return header or b""

    def _others(self, slot: int, slots: Sequence[int]) -> list[FoundVariant]:
        """The further encodings of the chunk in `slot`; none where their headers leave too little room for the chunks
        behind: every chunk has to be named before any is named twice."""
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
        """Of the variant that the answer names, or of the other one at `place`, counted from 1; a header that is None
        is read. Where the disk has lost what the answer names, the first other one takes its place."""
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
