"""What a fetch does when a member does not bring its chunks: go on with another one that has the same bytes."""

import math
import threading
import time
from collections.abc import Iterable, Iterator, Sequence

from kvstore_api.bulk import ReadPiece
from kvstore_api.placement import Member
from kvstore_api.v1 import kvstore_pb2 as pb
from kvstore_client.cluster_view import ClusterView
from kvstore_client.fetch.base import ReadTask
from kvstore_client.fetch.deliver import Delivery
from kvstore_client.lookup import StoredChunk
from kvstore_client.replicas import Search
from kvstore_client.settings import ClientSettings
from kvstore_client.transport import ReadStream
from kvstore_codec.chunk import read_header
from kvstore_codec.errors import CodecError, NodeUnavailableError

_CHECKS_PER_LIMIT = 5


class Reading:
    """A stream that is being read, and since when the next piece of it is waited for."""

    def __init__(self, stream: ReadStream, *, hurried: bool) -> None:
        """`hurried`: it is given up when it falls silent."""
        self._stream = stream
        self._hurried = hurried
        self._waiting_since_s = math.inf
        self.silent = False
        """Whether it was given up because nothing came."""

    def __iter__(self) -> Iterator[ReadPiece]:
        """Raises TransferError."""
        try:
            self._waiting_since_s = time.monotonic()
            for piece in self._stream:
                self._waiting_since_s = math.inf  # whatever the reader does now is not the sender's silence
                yield piece
                self._waiting_since_s = time.monotonic()
        finally:
            self._waiting_since_s = math.inf

    @property
    def moved_at_s(self) -> float:
        """When bytes last came, as far as the transport knows."""
        return self._stream.moved_at_s

    def end_if_silent(self, limit_s: float) -> None:
        silent_since_s = max(self._waiting_since_s, self.moved_at_s)
        if self._hurried and time.monotonic() - silent_since_s > limit_s:
            self.silent = True
            self._stream.cancel()


class Failover:
    """Knows for the chunks of one fetch who else has them, and ends streams that fell silent. Thread-safe, as long as
    the tasks of one chunk are in one thread."""

    def __init__(
        self, view: ClusterView, settings: ClientSettings, chunks: Sequence[StoredChunk], delivery: Delivery
    ) -> None:
        self._view, self._settings, self._chunks, self._delivery = view, settings, chunks, delivery
        self._tried = [{chunk.member} for chunk in chunks]
        self._lock = threading.Lock()
        self._readings: set[Reading] = set()
        self.leases: list[tuple[Member, bytes]] = []
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

        def take(index: int, member: Member, answer: pb.LookupAnswer) -> bool:
            try:
                same = read_header(answer.header) == self._chunks[index].header
            except CodecError:
                return False
            if same:
                places[index] = member
                self._tried[index].add(member)
            return same

        indices = sorted({task.chunk_index for task in tasks})
        ids = [chunk.chunk_id for chunk in self._chunks]
        encodings = sorted({self._chunks[index].header.encoding.name for index in indices})
        search = Search(self._view, self._settings, ids, encodings, take)
        try:
            self._delivery.on_end(search.cancel)
            tried = {index: self._tried[index] for index in indices}
            search.run(indices, tried, self._delivery.remaining_s())
        except NodeUnavailableError:
            return {}, list(tasks)
        finally:
            self.leases += search.leases
        found: dict[Member, list[ReadTask]] = {}
        for task in tasks:
            if task.chunk_index in places:
                found.setdefault(places[task.chunk_index], []).append(task)
        return found, [task for task in tasks if task.chunk_index not in places]

    def broke(self, member: Member, reason: str) -> None:
        """Have others leave this member alone for a while."""
        self.failed.add(member.endpoint)
        self._view.pause(member.endpoint, until_it_answers=reason == "unreachable")
        self._view.refresh()

    def watched(self, reading: Reading) -> Iterator[ReadPiece]:
        """The pieces of a stream, which ends when it is hurried and nothing comes for `failover_s`. Raises
        TransferError."""
        with self._lock:
            self._readings.add(reading)
        try:
            yield from reading
        finally:
            with self._lock:
                self._readings.discard(reading)

    def watch(self, over: threading.Event) -> None:
        """The loop of the thread that watches, until the fetch is over."""
        limit_s = self._settings.failover_s
        while not over.wait(limit_s / _CHECKS_PER_LIMIT):
            with self._lock:
                readings = list(self._readings)
            for reading in readings:
                self._delivery.moved(reading.moved_at_s)
                reading.end_if_silent(limit_s)
