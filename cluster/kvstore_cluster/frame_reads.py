"""Reads many ranges of frames in one request: from memory at once, and from disk asynchronously, several at a time."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import copy_context
from dataclasses import dataclass, field
from functools import lru_cache
from queue import SimpleQueue
from typing import Self

from kvstore_cluster.block_buffers import LARGEST_BYTES, BlockBuffers
from kvstore_cluster.catalog import ChunkCatalog
from kvstore_cluster.disk.record import BLOCK_BYTES
from kvstore_cluster.disk_reads import UnreadableChunkError
from kvstore_cluster.disk_tier import DiskTier
from kvstore_cluster.frame_plan import (
    BlockRead,
    FrameRange,
    PlacedRange,
    block_reads,
    blocks_around,
    bytes_of_frames,
)
from kvstore_cluster.reader import ChunkBytes, pieces_of
from kvstore_cluster.tallies import Tier
from kvstore_codec.chunk import ChunkHeader, read_header
from kvstore_codec.errors import ChunkFormatError, ChunkNotFoundError, FrameRangeError, StorageError
from kvstore_codec.identity import ChunkId

log = logging.getLogger(__name__)

_KNOWN_HEADERS = 1024

_parsed = lru_cache(maxsize=_KNOWN_HEADERS)(read_header)
"""A prefix is read period by period, with the same headers each time; parsing one takes 50 us."""


@dataclass(frozen=True, slots=True)
class FrameReadOptions:
    """How single frames are read from disk."""

    depth: int = 16
    """Reads that the disk works on at once, for all requests together."""
    merge: bool = True
    """Whether neighbouring ranges are read together."""


class RangeDroppedError(StorageError):
    """The client no longer wants the range."""


@dataclass(frozen=True, slots=True)
class RangeData:
    """The bytes of one range, or why there are none."""

    index: int
    """Index of the range in the request."""
    views: list[memoryview]
    failure: StorageError | None = None

    @property
    def size_bytes(self) -> int:
        return sum(view.nbytes for view in self.views)

    def pieces(self, piece_bytes: int) -> Iterator[list[memoryview]]:
        """The bytes, in order, in pieces of at most `piece_bytes`."""
        return pieces_of(self.views, piece_bytes)


@dataclass(slots=True)
class _OpenChunk:
    """A chunk that a request has acquired. Its damage is reported when the request is done with it: dropping the disk
    copy at once would fail the sound ranges behind the damaged one."""

    slot: int
    header: ChunkHeader
    uses: int = 1
    damage: ChunkFormatError | None = None


@dataclass(slots=True, eq=False)
class _Job:
    """A read that was submitted to the disk."""

    chunk: _OpenChunk
    read: BlockRead
    buffer: memoryview
    found: list[RangeData] = field(default_factory=list)
    future: Future[None] | None = None
    is_begun: bool = False
    is_read: bool = False
    is_finished: bool = False
    is_abandoned: bool = False


class FrameReads:
    """Serves the frame requests of one node. Thread-safe; requests share the threads and buffers for the disk."""

    def __init__(
        self,
        catalog: ChunkCatalog,
        stored: ChunkBytes,
        disk: DiskTier,
        acquire: Callable[[ChunkId, str, str], int],
        options: FrameReadOptions,
    ) -> None:
        """`acquire` returns the acquired slot of a stored chunk of a tenant, or raises ChunkNotFoundError."""
        self.catalog, self.stored, self.disk, self.acquire = catalog, stored, disk, acquire
        self.options = options
        self.buffers = BlockBuffers()
        self.threads = ThreadPoolExecutor(options.depth, thread_name_prefix="kvstore-disk-read")

    def close(self) -> None:
        """Ends the threads. No request may be in progress."""
        self.threads.shutdown()


class FrameRead:
    """One request, in one thread. Iterate over it once, inside its `with` block. Each range comes once, in any order;
    ranges from disk come as their reads end. The views of a range stay valid until the next one is asked for."""

    def __init__(
        self,
        reads: FrameReads,
        chunks: Sequence[ChunkId],
        encodings: Sequence[str],
        ranges: Sequence[FrameRange],
        tenant: str,
    ) -> None:
        """The request's ranges are read in their order, chunk by chunk."""
        self._reads, self._chunks, self._encodings, self._ranges = reads, chunks, encodings, ranges
        self._tenant = tenant
        self._dropped: set[int] = set()
        self._lock = threading.Lock()  # decides whether a job ends here or in its thread
        self._ended: SimpleQueue[_Job] = SimpleQueue()
        self._outstanding: set[_Job] = set()
        self._waiting: deque[tuple[_OpenChunk, BlockRead]] = deque()
        self._results = self._read()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Ends the request. Reads that the disk has begun end in their threads."""
        self._results.close()

    def drop(self, indices: Iterable[int]) -> None:
        """These ranges are not wanted any more. Those that the disk has not begun to read are not read."""
        self._dropped.update(indices)

    def __iter__(self) -> Iterator[RangeData]:
        return self._results

    def _read(self) -> Generator[RangeData, None, None]:
        by_chunk: dict[int, list[int]] = {}
        for index, wanted in enumerate(self._ranges):
            by_chunk.setdefault(wanted.chunk, []).append(index)
        unopened = deque(by_chunk.items())
        try:
            while unopened or self._waiting or self._outstanding:
                if len(self._outstanding) < self._reads.options.depth:
                    if self._waiting:
                        dropped = self._submit(*self._waiting[0])
                        if dropped is not None:
                            self._waiting.popleft()
                            yield from dropped
                            continue
                    elif unopened:
                        yield from self._open(*unopened.popleft())
                        continue
                yield from self._next_job()
        finally:
            self._abandon()

    def _open(self, chunk: int, indices: list[int]) -> Iterator[RangeData]:
        """Opens a chunk. Yields its ranges that need no wait for the disk, and queues the reads of the others."""
        wanted = [index for index in indices if index not in self._dropped]
        yield from (self._drop(index) for index in indices if index in self._dropped)
        if not wanted:
            return
        try:
            opened = self._acquired(self._chunks[chunk], self._encodings[chunk])
        except (ChunkNotFoundError, ChunkFormatError) as error:
            failure = ChunkNotFoundError(str(error))
            yield from (RangeData(index, [], failure) for index in wanted)
            return
        try:
            yield from self._read_chunk(opened, wanted)
        finally:
            self._release(opened)

    def _read_chunk(self, opened: _OpenChunk, wanted: Iterable[int]) -> Iterator[RangeData]:
        index, disk = self._reads.catalog.index, self._reads.disk
        unit_bytes = disk.read_unit_bytes if disk.is_present else BLOCK_BYTES
        on_disk: list[PlacedRange] = []
        for number in wanted:
            first, count = self._ranges[number].first_frame, self._ranges[number].frame_count
            is_whole = first == count == 0
            try:
                place = (
                    (0, index.size_bytes[opened.slot])
                    if is_whole
                    else bytes_of_frames(opened.header, first, count)
                )
            except FrameRangeError as error:
                yield RangeData(number, [], error)
                continue
            placed = PlacedRange(number, first, count, *place)
            in_memory = index.extent[opened.slot] is not None
            if in_memory or is_whole or placed.length > LARGEST_BYTES - 2 * max(unit_bytes, BLOCK_BYTES):
                yield self._read_now(opened, placed)
            else:
                on_disk.append(placed)
        if not on_disk:
            return
        reads = block_reads(on_disk, merge=self._reads.options.merge, block_bytes=unit_bytes)
        opened.uses += len(reads)
        self._waiting.extend((opened, read) for read in reads)

    def _read_now(self, opened: _OpenChunk, placed: PlacedRange) -> RangeData:
        """Reads a range in this thread: from memory, or a whole chunk or a very large frame from disk."""
        if placed.index in self._dropped:
            return self._drop(placed.index)
        tier = Tier.DISK if self._reads.catalog.index.extent[opened.slot] is None else Tier.MEMORY
        try:
            views = list(self._reads.stored.views(opened.slot, placed.offset, placed.length))
        except ChunkNotFoundError as error:
            return RangeData(placed.index, [], error)
        self._count_served(opened.slot, tier, placed.length)
        self._count(reads=1)
        return RangeData(placed.index, [view.toreadonly() for view in views])

    def _submit(self, opened: _OpenChunk, read: BlockRead) -> list[RangeData] | None:
        """Hands a read to the disk, without the ranges that were dropped, which are returned. None when there is no
        buffer for it now."""
        wanted = tuple(placed for placed in read.ranges if placed.index not in self._dropped)
        dropped = [placed.index for placed in read.ranges if placed.index in self._dropped]
        if wanted:
            if dropped:
                read = blocks_around(wanted, self._reads.disk.read_unit_bytes)
            buffer = self._reads.buffers.take(read.length, needed=not self._outstanding)
            if buffer is None:
                return None
            job = _Job(opened, read, buffer)
            self._outstanding.add(job)
            try:
                # In the request's context: its trace counts the disk's reads, and log lines have its id.
                job.future = self._reads.threads.submit(copy_context().run, self._run, job)
            except RuntimeError:  # this process has no thread left; an existing one may run the job yet
                self._run(job)
        else:
            self._release(opened)
        return [self._drop(index) for index in dropped]

    def _next_job(self) -> Iterator[RangeData]:
        """Waits for a read to end, and yields its ranges."""
        job = self._ended.get()
        self._outstanding.discard(job)
        try:
            for found in job.found:
                yield self._drop(found.index) if found.index in self._dropped else found
        finally:
            self._finish(job)

    def _abandon(self) -> None:
        """Ends an iteration that may have stopped early. Reads that the disk has begun end in their threads."""
        for opened, _ in self._waiting:
            self._release(opened)
        self._waiting.clear()
        for job in self._outstanding:
            with self._lock:
                job.is_abandoned = True
                ours = job.is_finished or (job.future is not None and job.future.cancel())
            if ours:
                self._finish(job)
        self._outstanding.clear()

    def _drop(self, index: int) -> RangeData:
        self._count(ranges_dropped=1)
        return RangeData(index, [], RangeDroppedError("the client cancelled the range"))

    def _count_served(self, slot: int, tier: Tier, size_bytes: int) -> None:
        with self._reads.catalog.lock:
            self._reads.catalog.count_served(slot, tier, size_bytes)

    def _count(self, **amounts: int) -> None:
        """Adds to counters of the node."""
        catalog = self._reads.catalog
        with catalog.lock:
            for name, amount in amounts.items():
                setattr(catalog.counters, name, getattr(catalog.counters, name) + amount)

    # ---- in the threads of the disk

    def _run(self, job: _Job) -> None:
        with self._lock:
            if job.is_begun:
                return
            job.is_begun = True
        failure = ChunkNotFoundError("a bug in kvstore ended the read; the log has the traceback")
        job.found = [RangeData(placed.index, [], failure) for placed in job.read.ranges]
        try:
            # A read that waited for its turn while all of it was dropped costs the disk nothing.
            if not self._dropped.issuperset(placed.index for placed in job.read.ranges):
                job.is_read = True
                job.found = self._read_job(job)
        except Exception:
            log.exception("reading frames of chunk %s failed", job.chunk.header.chunk_id.short)
        with self._lock:
            job.is_finished = True
            abandoned = job.is_abandoned
        if abandoned:
            self._finish(job)
        else:
            self._ended.put(job)

    def _read_job(self, job: _Job) -> list[RangeData]:
        """Reads the blocks and verifies the frames of each range. What fails one range does not fail the others."""
        try:
            self._fill(job, job.read)
        except UnreadableChunkError as error:
            if len(job.read.ranges) == 1:
                return [RangeData(job.read.ranges[0].index, [], error)]
            return [self._read_alone(job, placed) for placed in job.read.ranges]
        except ChunkNotFoundError as error:
            return [RangeData(placed.index, [], error) for placed in job.read.ranges]
        return [self._verified(job, placed) for placed in job.read.ranges]

    def _read_alone(self, job: _Job, placed: PlacedRange) -> RangeData:
        """Reads one range of a read that failed as a whole."""
        try:
            self._fill(job, job.read, blocks_around((placed,), self._reads.disk.read_unit_bytes))
        except ChunkNotFoundError as error:
            return RangeData(placed.index, [], error)
        return self._verified(job, placed)

    def _fill(self, job: _Job, read: BlockRead, part: BlockRead | None = None) -> None:
        part = part or read
        begin = part.offset - read.offset
        self._reads.disk.reads.blocks(job.chunk.slot, part.offset, job.buffer[begin : begin + part.length])

    def _verified(self, job: _Job, placed: PlacedRange) -> RangeData:
        begin = placed.offset - job.read.offset
        view = job.buffer[begin : begin + placed.length]
        try:
            job.chunk.header.verify_frames(placed.first_frame, placed.frame_count, view)
        except ChunkFormatError as error:
            job.chunk.damage = error
            return RangeData(placed.index, [], ChunkNotFoundError(str(error)))
        return RangeData(placed.index, [view.toreadonly()])

    # ---- chunks

    def _acquired(self, chunk_id: ChunkId, encoding: str) -> _OpenChunk:
        """Raises ChunkNotFoundError, ChunkFormatError."""
        slot = self._reads.acquire(chunk_id, encoding, self._tenant)
        try:
            return _OpenChunk(slot, _parsed(self._reads.stored.header(slot)))
        except BaseException:
            with self._reads.catalog.lock:
                self._reads.catalog.release(slot)
            raise

    def _finish(self, job: _Job) -> None:
        """Returns what a finished or cancelled job holds."""
        if job.is_read:
            sent = [data for data in job.found if data.index not in self._dropped]
            sizes = [data.size_bytes for data in sent if data.failure is None]
            self._count_served(job.chunk.slot, Tier.DISK, sum(sizes))
            self._count(
                reads=len(sizes),
                frame_disk_reads=1,
                frame_disk_bytes=job.read.length,
            )
        job.found = []
        self._reads.buffers.give_back(job.buffer)
        self._release(job.chunk)

    def _release(self, opened: _OpenChunk) -> None:
        """Ends one use of an open chunk. The last one releases the chunk, and drops its disk copy if it is damaged."""
        with self._lock:
            opened.uses -= 1
            if opened.uses:
                return
        if opened.damage is not None:
            self._reads.disk.reads.drop(opened.slot, opened.damage)
        with self._reads.catalog.lock:
            self._reads.catalog.release(opened.slot)
