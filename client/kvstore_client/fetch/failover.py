"""What a fetch does when a member does not bring its chunks: go on with another one that has the same bytes."""

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
"""Where the plan may change, so much is asked for at once: what was asked for cannot be planned anew."""
_TOO_LONG_S = 3 * AHEAD_S


class Reading:
    """A stream that is being read: since when the next piece of it is waited for, and how fast it comes."""

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
        """`sizes_bytes` are those of the reads it brings. `hurried`: it is given up when it falls silent. `links` are
        told how fast its bytes come, for what `request`, and whether that keeps the engine waiting."""
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
        """Of the piece that is waited for, those that the links were told of, and when."""
        self.is_silent = False
        """Whether it was given up because nothing came."""
        self.is_slow = False
        """Whether it had better be given up after the read that is under way: what is behind that comes too late."""

    def __iter__(self) -> Iterator[ReadPiece]:
        """Raises TransferError."""
        first = True
        try:
            self._wait()
            for piece in self._stream:
                self._arrived(len(piece.data), first=first)
                first = False
                yield piece  # whatever the reader does now is not the sender's silence
                self._wait()
        finally:
            with self._lock:
                self._waiting_since_s = self._seen_at_s = math.inf

    @property
    def moved_at_s(self) -> float:
        """When bytes last came, as far as the transport knows."""
        return self._stream.moved_at_s

    def look(self) -> None:
        """Observe what has come of an incomplete piece."""
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
        """It is slow when what is behind the read under way would take longer than `limit_s`. That read itself is
        brought to its end, however long it takes: otherwise a link could be too slow for any."""
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
                # The first piece also took the way there and back, which is not the link's bandwidth.
                bandwidth_Bps = self._links.bandwidth_Bps(self._endpoint)  # noqa: N806
                if bandwidth_Bps:
                    self._links.first_byte(self._endpoint, max(0.0, seconds - size_bytes / bandwidth_Bps))
                seconds = max(seconds - self._links.latency_s(self._endpoint), seconds / 2)
            if size_bytes:  # otherwise it is the news that a chunk has gone
                self._observe(size_bytes - self._seen_bytes, seconds)
            self._received_bytes += size_bytes - self._seen_bytes
            self._waiting_since_s = self._seen_at_s = math.inf

    def _observe(self, size_bytes: int, seconds: float) -> None:
        self._links.observe(
            self._endpoint, size_bytes, seconds, request=self._request, waited_for=self._is_waited_for()
        )


class Failover:
    """Knows for the chunks of one fetch who else has them, and ends streams that fell silent. Thread-safe, as long as
    the tasks of one chunk are in one thread."""

    def __init__(
        self,
        view: ClusterView,
        links: Links,
        settings: ClientSettings,
        chunks: Sequence[StoredChunk],
        progress: FetchState,
        *,
        replans: bool,
    ) -> None:
        self.links = links
        self._replans = replans
        self._view, self._settings, self._chunks, self._progress = view, settings, chunks, progress
        self._tried = [{chunk.member} for chunk in chunks]
        self._lock = threading.Lock()
        self._readings: set[tuple[Member, Reading]] = set()
        self.leases: list[Lease] = []
        """What was leased on the way."""
        self.failed: set[str] = set()
        """Endpoints that broke down, and were paused."""

    def members(self) -> set[Member]:
        """Everybody who was asked to bring a chunk."""
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

    def elsewhere(self, tasks: Sequence[ReadTask]) -> tuple[dict[Member, list[ReadTask]], list[ReadTask]]:
        """Who has the very same chunks besides those that were tried, and the tasks for which there is nobody."""
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
            with self._progress.until_end(search.cancel):
                search.run(indices, tried, self._progress.remaining_s())
        except NodeUnavailableError:
            return {}, list(tasks)
        finally:
            self.leases += search.leases
        found: dict[Member, list[ReadTask]] = {}
        for task in tasks:
            if task.chunk_index in places:
                found.setdefault(places[task.chunk_index], []).append(task)
        return found, [task for task in tasks if task.chunk_index not in places]

    def broke(self, member: Member, reason: MissReason) -> None:
        """Have others leave this member alone for a while."""
        self.failed.add(member.endpoint)
        why = f"the storage node at {member.endpoint} did not bring chunks: {reason}"
        self._view.pause(member.endpoint, why, until_it_answers=reason is MissReason.UNREACHABLE)
        self._view.refresh()

    @contextmanager
    def watched(self, member: Member, reading: Reading) -> Iterator[Reading]:
        """Meanwhile the stream ends when it is hurried and nothing comes for `failover_s`, or when it has become so
        slow that the rest had better be planned anew."""
        with self._lock:
            self._readings.add((member, reading))
        try:
            yield reading
        finally:
            with self._lock:
                self._readings.discard((member, reading))

    def watch(self, over: threading.Event) -> None:
        """The loop of the thread that watches, until the fetch is over."""
        limit_s = self._settings.timeouts.failover_s
        while not over.wait(min(limit_s / _CHECKS_PER_LIMIT, _LOOK_EVERY_S)):
            self._progress.check_patience()
            with self._lock:
                readings = list(self._readings)
            for member, reading in readings:
                reading.look()
                self._progress.moved(reading.moved_at_s)
                reading.end_if_silent(limit_s)
                if self._replans:
                    reading.check_speed(self.links.bandwidth_Bps(member.endpoint), _TOO_LONG_S)
