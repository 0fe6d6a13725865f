"""Failover of a fetch: reads chunks from another member when the first one fails or falls silent."""

import math
import threading
import time
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate

from kvstore_api.bulk import ReadPiece
from kvstore_api.placement import Member
from kvstore_api.v1 import kvstore_pb2 as pb
from kvstore_client.cluster_view import ClusterView
from kvstore_client.fetch.base import ReadTask
from kvstore_client.fetch.fetch_state import FetchState
from kvstore_client.match import StoredChunk
from kvstore_client.miss_reason import MissReason
from kvstore_client.planning import Links
from kvstore_client.replicas import Lease, Search
from kvstore_client.settings import ClientSettings
from kvstore_client.transport import ReadStream
from kvstore_codec.chunk import ChunkHeader, read_header
from kvstore_codec.errors import CodecError, NodeUnavailableError

_CHECKS_PER_LIMIT = 5
_LOOK_EVERY_S = 0.05
AHEAD_S = 0.1
"""While the plan may change, reads are requested this far ahead, seconds: requested reads cannot be replanned."""
_TOO_LONG_S = 3 * AHEAD_S


class WatchedStream:
    """A stream in progress: how long its next piece has been awaited, and how fast bytes arrive."""

    def __init__(
        self,
        stream: ReadStream,
        links: Links,
        endpoint: str,
        sizes_bytes: Sequence[int],
        *,
        request: object,
        is_waited_for: Callable[[], bool],
        hurried: bool,
    ) -> None:
        """`sizes_bytes` are the sizes of its reads. A `hurried` stream is aborted when it falls silent. `links` learns
        the speed of the bytes, the `request` that they belong to, and whether the engine is waiting for it."""
        self._stream = stream
        self._links, self._endpoint, self._request = links, endpoint, request
        self._is_waited_for = is_waited_for
        self._hurried = hurried
        self._ends_bytes = list(accumulate(sizes_bytes))
        self._received_bytes = 0
        self._lock = threading.Lock()
        self._waiting_since_s = math.inf
        self._seen_at_s = math.inf
        self._seen_bytes = 0
        """Bytes of the awaited piece that `links` has been told of, and when."""
        self.is_silent = False
        """Whether the stream was aborted because nothing arrived."""
        self.is_slow = False
        """Abort after the current read; later reads would arrive too late."""

    def __iter__(self) -> Iterator[ReadPiece]:
        """Iterate over the pieces. Raises TransferError."""
        first = True
        try:
            self._wait()
            for piece in self._stream:
                self._arrived(len(piece.data), first=first)
                first = False
                yield piece  # time that the reader spends on a piece is not the sender's silence
                self._wait()
        finally:
            with self._lock:
                self._waiting_since_s = self._seen_at_s = math.inf

    @property
    def moved_at_s(self) -> float:
        """Monotonic time at which bytes last arrived, as far as the transport knows."""
        return self._stream.moved_at_s

    def look(self) -> None:
        """Observe the received bytes of an incomplete piece."""
        with self._lock:
            now_s, incomplete_bytes = time.monotonic(), self._stream.incomplete_bytes
            if now_s > self._seen_at_s and incomplete_bytes > self._seen_bytes:
                self._observe(incomplete_bytes - self._seen_bytes, now_s - self._seen_at_s)
                self._received_bytes += incomplete_bytes - self._seen_bytes
                self._seen_at_s, self._seen_bytes = now_s, incomplete_bytes

    def end_if_silent(self, limit_s: float) -> None:
        silent_since_s = max(self._waiting_since_s, self.moved_at_s)
        if self._hurried and time.monotonic() - silent_since_s > limit_s:
            self.is_silent = True
            self._stream.cancel()

    def check_speed(self, bandwidth_Bps: float | None, limit_s: float) -> None:  # noqa: N803
        """Mark the stream as slow when the reads behind the current one would take longer than `limit_s`. The current
        read is finished in any case: otherwise a link could be too slow for any read."""
        under_way = bisect_right(self._ends_bytes, self._received_bytes)
        if bandwidth_Bps is not None and under_way < len(self._ends_bytes):
            behind_bytes = self._ends_bytes[-1] - self._ends_bytes[under_way]
            self.is_slow |= behind_bytes > limit_s * bandwidth_Bps

    def _wait(self) -> None:
        with self._lock:
            self._waiting_since_s = self._seen_at_s = time.monotonic()
            self._seen_bytes = 0

    def _arrived(self, size_bytes: int, *, first: bool) -> None:
        with self._lock:
            seconds = time.monotonic() - self._seen_at_s
            if first and not self._seen_bytes:
                # The first piece includes the round trip, which does not count as bandwidth.
                seconds = self._links.first_piece_s(self._endpoint, size_bytes, seconds)
            if size_bytes:  # otherwise the piece reports an evicted chunk
                self._observe(size_bytes - self._seen_bytes, seconds)
            self._received_bytes += size_bytes - self._seen_bytes
            self._waiting_since_s = self._seen_at_s = math.inf

    def _observe(self, size_bytes: int, seconds: float) -> None:
        self._links.observe(
            self._endpoint, size_bytes, seconds, request=self._request, waited_for=self._is_waited_for()
        )


class Failover:
    """Finds other members for the chunks of one fetch, and ends silent streams. Thread-safe, as long as each chunk's
    tasks are handled by one thread."""

    def __init__(
        self,
        view: ClusterView,
        links: Links,
        settings: ClientSettings,
        chunks: Sequence[StoredChunk],
        fetch_state: FetchState,
        *,
        replans: bool,
    ) -> None:
        self.links = links
        self._replans = replans
        self._view, self._settings, self._chunks, self._fetch_state = view, settings, chunks, fetch_state
        self._tried = [{chunk.member} for chunk in chunks]
        self._lock = threading.Lock()
        self._readings: set[tuple[Member, WatchedStream]] = set()
        self.leases: list[Lease] = []
        """Leases taken during failover."""
        self.failed: set[str] = set()
        """Endpoints that failed and were paused."""

    def members(self) -> set[Member]:
        """All members that chunks were requested from."""
        return set().union(*self._tried)

    def has_others(self, tasks: Iterable[ReadTask]) -> bool:
        """Whether another member should have any of these chunks."""
        indices = list({task.chunk_index for task in tasks})
        try:
            if self._view.membership().replicas == 1:
                return False
            readers = self._view.readers([self._chunks[index].chunk_id.content_id for index in indices])
        except NodeUnavailableError:
            return False
        return any(set(members) - self._tried[i] for i, members in zip(indices, readers, strict=True))

    def find_others(self, tasks: Sequence[ReadTask]) -> tuple[dict[Member, list[ReadTask]], list[ReadTask]]:
        """Members that have the same chunks, apart from those tried before, with the tasks for each; and the tasks that
        no other member has."""
        places: dict[int, Member] = {}
        wanted: dict[int, set[ChunkHeader]] = {}
        for task in tasks:
            wanted.setdefault(task.chunk_index, set()).add(task.variant.header)
        encodings = sorted({task.encoding.name for task in tasks})

        def take(index: int, member: Member, answer: pb.LookupAnswer) -> bool:
            try:
                headers = [read_header(data) for data in (answer.header, *(o.header for o in answer.others))]
            except CodecError:
                return False
            same = wanted[index].issubset(headers)
            if same:
                places[index] = member
                self._tried[index].add(member)
            return same

        indices = sorted(wanted)
        ids = [chunk.chunk_id for chunk in self._chunks]
        search = Search(self._view, self._settings, ids, encodings, take, all_encodings=len(encodings) > 1)
        try:
            tried = {index: self._tried[index] for index in indices}
            with self._fetch_state.until_end(search.cancel):
                search.run(indices, tried, self._fetch_state.remaining_s())
        except NodeUnavailableError:
            return {}, list(tasks)
        finally:
            self.leases += search.leases
        found: dict[Member, list[ReadTask]] = {}
        for task in tasks:
            if task.chunk_index in places:
                found.setdefault(places[task.chunk_index], []).append(task)
        return found, [task for task in tasks if task.chunk_index not in places]

    def refuse(self, task: ReadTask) -> None:
        """Remember a chunk whose frames are not those that were signed."""
        variant = task.variant
        self._view.signatures.refuse(variant.header, variant.header_data)

    def pause(self, member: Member, reason: MissReason) -> None:
        """Pause this member for all fetches."""
        self.failed.add(member.endpoint)
        why = f"the storage node at {member.endpoint} did not send chunks: {reason}"
        self._view.pause(member.endpoint, why, until_it_answers=reason is MissReason.UNREACHABLE)
        self._view.refresh()

    @contextmanager
    def watched(self, member: Member, reading: WatchedStream) -> Iterator[WatchedStream]:
        """Inside the block the stream is ended when it is hurried and silent for `failover_s`, or so slow that its
        remaining reads should be replanned."""
        with self._lock:
            self._readings.add((member, reading))
        try:
            yield reading
        finally:
            with self._lock:
                self._readings.discard((member, reading))

    def watch(self, over: threading.Event) -> None:
        """Loop of the thread that watches the streams, until the fetch ends."""
        limit_s = self._settings.timeouts.failover_s
        while not over.wait(min(limit_s / _CHECKS_PER_LIMIT, _LOOK_EVERY_S)):
            with self._lock:
                readings = list(self._readings)
            for member, reading in readings:
                reading.look()
                self._fetch_state.note_moved(reading.moved_at_s)
                reading.end_if_silent(limit_s)
                if self._replans:
                    reading.check_speed(self.links.bandwidth_Bps(member.endpoint), _TOO_LONG_S)
            self._fetch_state.check_stall()
