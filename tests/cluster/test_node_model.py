"""Any sequence of calls to a storage node with a small memory and a small disk: its metadata agrees after each call."""

import shutil
import tempfile
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import NamedTuple

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvstore_cluster import intake
from kvstore_cluster.arena import Arena
from kvstore_cluster.disk import SegmentStore
from kvstore_cluster.durability import Durability
from kvstore_cluster.leases import LeaseId, LeaseTable
from kvstore_cluster.lookup import LookupRequest
from kvstore_cluster.node import StorageNode
from kvstore_cluster.put import PendingPut, PutOptions
from kvstore_cluster.reader import ChunkReader
from kvstore_codec.errors import ChunkNotFoundError, StorageError
from tests.clock import Clock
from tests.cluster.disk.conftest import MEMORY
from tests.sample_chunk import SampleChunk, sample_chunk

CHUNKS = [sample_chunk(content=number, frame_bytes=18_000) for number in range(24)]
SIZE = max(len(chunk.data) for chunk in CHUNKS)
FRAMES = CHUNKS[0].header.geometry.frame_count
TEXT = 6  # chunks of one text
ENDING = range(0, len(CHUNKS), 5)  # chunks that are stored with a TTL
LEASE_S = 10.0

NUMBERS = st.integers(0, len(CHUNKS) - 1)
DURABILITIES = st.sampled_from([Durability.MEMORY, Durability.RELAXED, Durability.DURABLE])
TENANTS = st.sampled_from("ab")


class OpenReader(NamedTuple):
    number: int
    reading: AbstractContextManager[ChunkReader]
    views: list[memoryview]
    wanted: bytes


class NodeMachine(RuleBasedStateMachine):
    """`promised`: the chunks that each lease covers and that nobody has deleted, and when the lease ends."""

    @initialize()
    def begin(self) -> None:
        self.folder = Path(tempfile.mkdtemp(dir=MEMORY if MEMORY.is_dir() else None))
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(intake, "FLUSH_PATIENCE_S", 0.0)  # there is no thread to wait for
        self.clock = Clock()
        self.pending: list[tuple[PendingPut, SampleChunk]] = []
        self.readers: list[OpenReader] = []
        self._start()

    def _start(self) -> None:
        self.promised: dict[LeaseId, tuple[set[int], float]] = {}
        self.store = SegmentStore(self.folder, 4 << 20, segment_bytes=1 << 20, sync_period_s=1e6)
        self.node = StorageNode(
            "node-0",
            Arena(6 * (SIZE + (4 << 10)), 4 << 10),
            store=self.store,
            leases=LeaseTable(clock=self.clock),
            clock=self.clock,
        )

    @rule(first=NUMBERS, count=st.integers(1, 12), durability=DURABILITIES, tenant=TENANTS)
    def put(self, first: int, count: int, durability: Durability, tenant: str) -> None:
        for number in range(first, min(first + count, len(CHUNKS))):
            with suppress(StorageError):
                put = self._begin_put(number, durability, tenant)
                if put is not None:
                    put.write(CHUNKS[number].data)
                    put.commit()

    @precondition(lambda self: len(self.pending) < 2)
    @rule(number=NUMBERS, durability=DURABILITIES, tenant=TENANTS)
    def begin_put(self, number: int, durability: Durability, tenant: str) -> None:
        with suppress(StorageError):
            put = self._begin_put(number, durability, tenant)
            if put is not None:
                self.pending.append((put, CHUNKS[number]))

    def _begin_put(self, number: int, durability: Durability, tenant: str) -> PendingPut | None:
        """Within its text."""
        place, chunk = number % TEXT, CHUNKS[number]
        options = PutOptions(
            durability,
            ttl_s=5.0 if number in ENDING else 0.0,
            tenant=tenant,
            number=place,
            behind=tuple(CHUNKS[number - back].chunk_id for back in range(1, place + 1)),
        )
        return self.node.begin_put(chunk.chunk_id, chunk.encoding, len(chunk.data), options=options)

    @precondition(lambda self: self.pending)
    @rule(commits=st.booleans())
    def end_put(self, commits: bool) -> None:
        put, chunk = self.pending.pop(0)
        if commits:
            with suppress(StorageError):
                put.write(chunk.data)
                put.commit()
        put.revoke()

    @rule(pick=NUMBERS, frames=st.sampled_from([(0, 1), (3, 2), (0, FRAMES)]), stays=st.booleans())
    def read(self, pick: int, frames: tuple[int, int], stays: bool) -> None:
        """A reader that stays keeps views of what it read."""
        number = self._stored(pick)
        chunk = CHUNKS[number]
        reading = self.node.open(chunk.chunk_id, chunk.encoding)
        try:
            reader = reading.__enter__()
        except ChunkNotFoundError:
            return
        views = [view for piece in reader.pieces(*frames, 1 << 20) for view in piece]
        wanted = chunk.frames(*frames)
        assert b"".join(views) == wanted
        if stays:
            self.readers.append(OpenReader(number, reading, views, wanted))
        else:
            reading.__exit__(None, None, None)

    @precondition(lambda self: self.readers)
    @rule()
    def end_read(self) -> None:
        reader = self.readers.pop(0)
        assert b"".join(reader.views) == reader.wanted
        reader.reading.__exit__(None, None, None)

    @rule(first=NUMBERS, count=st.integers(1, TEXT), follows=st.booleans())
    def lookup(self, first: int, count: int, follows: bool) -> None:
        numbers = range(first, min(first + count, len(CHUNKS)))
        names = [CHUNKS[number].chunk_id for number in numbers]
        request = LookupRequest(names, ["exact-zstd"], lease_s=LEASE_S, use_follows=follows)
        result = self.node.lookup(request)
        found = {n for n, answer in zip(numbers, result.answers, strict=True) if answer.encoding is not None}
        for number, answer in zip(numbers, result.answers, strict=True):
            if answer.encoding is not None:
                assert answer.header == CHUNKS[number].data[: CHUNKS[number].header.header_bytes]
        if result.lease_id is not None:
            self.promised[result.lease_id] = found, self.clock.now_s + LEASE_S

    @precondition(lambda self: self.promised)
    @rule(used=st.sampled_from([b"\x01", b"\x07", b"\xff"]))
    def use(self, used: bytes) -> None:
        """From then on the lease covers some of what it did."""
        lease_id, (_, ends_s) = self.promised.popitem()
        self.node.use(lease_id, used, 256)
        self.promised[lease_id] = set(), ends_s

    @precondition(lambda self: self.promised)
    @rule(renews=st.booleans())
    def end_lease(self, renews: bool) -> None:
        lease_id = next(iter(self.promised))
        promised, ends_s = self.promised.pop(lease_id)
        if not renews:
            self.node.release_lease(lease_id)
        elif self.node.renew_lease(lease_id, LEASE_S):
            self.promised[lease_id] = promised, self.clock.now_s + LEASE_S
        else:
            assert not promised or ends_s <= self.clock.now_s

    @rule(pick=NUMBERS)
    def delete(self, pick: int) -> None:
        self._delete(self._stored(pick))

    @precondition(lambda self: self.readers)
    @rule()
    def delete_what_is_read(self) -> None:
        self._delete(self.readers[-1].number)

    def _delete(self, number: int) -> None:
        self.node.delete([CHUNKS[number].chunk_id])
        assert not self._is_stored(number)
        for promised, _ in self.promised.values():
            promised.discard(number)

    @rule(numbers=st.sets(NUMBERS, max_size=4))
    def pin(self, numbers: set[int]) -> None:
        self.node.set_pins({"": {CHUNKS[number].chunk_id for number in numbers}})

    @rule(limits=st.dictionaries(TENANTS, st.integers(1, 6)))
    def limit(self, limits: dict[str, int]) -> None:
        self.node.set_quotas({tenant: chunks * SIZE for tenant, chunks in limits.items()})

    @rule(number=NUMBERS)
    def verify(self, number: int) -> None:
        assert self.node.verify(CHUNKS[number].chunk_id, "exact-zstd") is None

    @rule()
    def maintain(self) -> None:
        while self.node.maintain():
            self.node.check_integrity()

    @rule(seconds=st.integers(1, 6))
    def wait(self, seconds: int) -> None:
        self.clock.now_s += seconds

    @precondition(lambda self: not self.promised)
    @rule()
    def restart(self) -> None:
        self._end_all()
        self.node.close()
        self._start()

    @invariant()
    def metadata_agrees(self) -> None:
        if hasattr(self, "node"):
            self.node.check_integrity()
            self.store.check_integrity()

    @invariant()
    def what_is_leased_stays(self) -> None:
        for promised, ends_s in getattr(self, "promised", {}).values():
            if self.clock.now_s < ends_s:
                assert all(self._is_stored(number) for number in promised if number not in ENDING)

    def _is_stored(self, number: int) -> bool:
        request = LookupRequest([CHUNKS[number].chunk_id], ["exact-zstd"], peek=True, with_headers=False)
        return self.node.lookup(request).answers[0].encoding is not None

    def _stored(self, pick: int) -> int:
        """One of the stored chunks; any where none is stored."""
        stored = [number for number in range(len(CHUNKS)) if self._is_stored(number)]
        return stored[pick % len(stored)] if stored else pick

    def _end_all(self) -> None:
        while self.pending:
            self.end_put(commits=False)
        while self.readers:
            self.end_read()

    def teardown(self) -> None:
        if hasattr(self, "node"):
            self._end_all()
            self.node.close()
            self.patch.undo()
            shutil.rmtree(self.folder)


TestNode = NodeMachine.TestCase
TestNode.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
