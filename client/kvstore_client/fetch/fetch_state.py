"""Shared state of a fetch's stages and its engine: who waits for what, and when the fetch ends."""

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress

from kvstore_api.placement import Member
from kvstore_client.fetch.base import ReadTask
from kvstore_client.fetch.ledger import FetchLedger
from kvstore_client.fetch.replanner import Replanner
from kvstore_client.fetch.report import FetchReport
from kvstore_client.match import StoredChunk
from kvstore_client.miss_reason import MissReason
from kvstore_client.timeline import Timeline


class FetchState:
    """State of one fetch. Thread-safe.

    The plan has each chunk read in one of its variants or computed by the engine; missing chunks are computed, too. A
    fetch ends when every chunk is delivered or computed, at its deadline, when nothing arrives for `stall_s`, or by
    `end`.
    """

    def __init__(
        self,
        chunks: Sequence[StoredChunk],
        *,
        layers: int,
        deadline_s: float,
        stall_s: float,
        timeline: Timeline,
        replanner: Replanner | None = None,
        computed: Sequence[range] = (),
        windows: Sequence[int | None] = (),
    ) -> None:
        """`computed` are positions that are not read, because the engine computes them; not together with a
        `replanner`. `windows` are the sliding windows of the layers: what lies before the windows of all computed
        tokens is not read either."""
        self.timeline = timeline
        self._deadline = time.monotonic() + deadline_s
        self._stall_s = stall_s
        self._last_progress = time.monotonic()
        self._changed = threading.Condition()
        self._replanner = replanner
        self._ledger = FetchLedger(chunks, layers, replanner, computed, windows)
        self._version = 0
        self._engine_waits = False
        self._received_bytes = 0
        self.silence_s = 0.0
        """Seconds in which nothing had come when the fetch was overtaken by the engine; 0 in another fetch."""
        self._ended = False
        self._end_callbacks: list[Callable[[], object]] = []
        self._ready_callbacks: list[Callable[[], object]] = []

    @property
    def members(self) -> list[Member]:
        """Members that hold chunks of this fetch."""
        return list(self._ledger.by_member)

    @property
    def is_engine_waiting(self) -> bool:
        """Whether the engine does nothing but wait for this fetch."""
        return self._engine_waits

    # ---- called by the stages

    def remaining_s(self) -> float:
        return max(0.0, self._deadline - time.monotonic())

    @property
    def is_over(self) -> bool:
        with self._changed:
            return self._ended

    @property
    def is_settled(self) -> bool:
        """Whether nothing more will arrive."""
        with self._changed:
            return self._ended or not self._ledger.open_chunks

    def next_reads(self, member: Member, limit_bytes: float) -> list[ReadTask]:
        """The next reads from this member, in the order in which they are needed: up to `limit_bytes`, at least one
        read. Blocks while there are none but may be later. Empty when the fetch is over."""
        with self._changed:
            while not self._ended:
                for idle in (False, True):
                    self._adjust(idle=idle)
                    if tasks := self._ledger.next_reads(member, limit_bytes):
                        return tasks
                # An early end lets the stages' threads exit; idle threads slow the engine down.
                if not self._ledger.may_read_more(member):
                    self._ledger.close(member)
                    return []
                self._changed.wait()
            return []

    def requeue(self, tasks: Sequence[ReadTask]) -> None:
        """Replan requested reads that did not arrive."""
        with self._changed:
            self._ledger.requeue(tasks)
            self._adjust()
            self._notify()

    @property
    def silent_s(self) -> float:
        """Seconds since something arrived or was delivered."""
        with self._changed:
            return time.monotonic() - self._last_progress

    @property
    def received_bytes(self) -> int:
        with self._changed:
            return self._received_bytes

    def count_received(self, received_bytes: int) -> None:
        with self._changed:
            self._received_bytes += received_bytes
            self._last_progress = time.monotonic()

    def note_moved(self, at_s: float) -> None:
        """Record that bytes of an incomplete piece arrived at this time."""
        with self._changed:
            self._last_progress = max(self._last_progress, at_s)

    def check_stall(self) -> None:
        """Called periodically: ends a fetch that is late or stalled, even when no engine waits for it, and one that is
        slower than computing."""
        with self._changed:
            is_open = self._ledger.open_chunks and not self._ended
            if is_open and self._until_stalled_s() <= 0:
                self._end_stalled()
                is_open = False
            overtaken = (
                is_open and self._replanner is not None and self._replanner.is_overtaken(self._ledger.states)
            )
            if overtaken:
                self.silence_s = time.monotonic() - self._last_progress
        if overtaken:
            self.end(MissReason.OVERTAKEN)
        self._tell_if_ready()

    def begin_decode(self, task: ReadTask) -> bool:
        """Whether this read is still wanted. If so, the decoder owns its memory until `deliver` or `fail`."""
        with self._changed:
            state = self._ledger.states[task.chunk_index]
            if state.to_compute or self._ended:
                return False
            state.decoding += 1
            return True

    def deliver(self, task: ReadTask) -> bool:
        """Record that a read is in its place; returns whether no more of its chunk will arrive."""
        with self._changed:
            self._last_progress = time.monotonic()
            settled = self._ledger.deliver(task)
            self._notify()
        if settled:
            self._tell_if_ready()
        return settled

    def fail(self, task: ReadTask, reason: MissReason) -> None:
        """Record that a read will not be decoded."""
        with self._changed:
            self._ledger.states[task.chunk_index].decoding -= 1
        self.fail_chunks([task], reason)

    def fail_chunks(self, tasks: Iterable[ReadTask], reason: MissReason) -> None:
        """Record that reads will not arrive: the engine computes their chunks. The first reason is kept."""
        with self._changed:
            if not self._ended:
                self._ledger.lose(dict.fromkeys(task.chunk_index for task in tasks), reason)
            self._notify()
        self._tell_if_ready()

    def on_end(self, callback: Callable[[], object]) -> None:
        """Call `callback` when the fetch ends; at once if it has ended."""
        with self._changed:
            if not self._ended:
                self._end_callbacks.append(callback)
                return
        callback()

    @contextmanager
    def until_end(self, callback: Callable[[], object]) -> Iterator[None]:
        """Like `on_end`, but only inside the block: a fetch may read from many streams, one after the other."""
        self.on_end(callback)
        try:
            yield
        finally:
            with self._changed, suppress(ValueError):  # the callback was called
                self._end_callbacks.remove(callback)

    # ---- called by the engine

    def on_ready(self, callback: Callable[[], object]) -> None:
        """Call `callback` once, when the engine would no longer wait: there is a chunk to compute, or nothing more will
        arrive."""
        with self._changed:
            if not (self._ended or self._ledger.is_ready):
                self._ready_callbacks.append(callback)
                return
        callback()

    def next_to_compute(self) -> tuple[int, int] | None:
        """The next run of chunks `[first, end)` for the engine to compute before its last pass, which begins after the
        last chunk that is fetched. Blocks until all chunks before the run are delivered. None when there is no such
        run: the remaining chunks arrive by themselves, or the last pass computes them."""
        with self._changed:
            self._ledger.return_last_pass()
            self._notify()
            self._adjust(idle=True)
            while True:
                first = self._ledger.first_to_compute()
                if first is None:
                    if self._ledger.take_last_pass():
                        self._notify()
                        return None
                elif self._ledger.is_settled_before(first):
                    end = self._ledger.take_run(first)
                    if end is not None:
                        self._notify()
                        return first, end
                self._wait_for_news()

    def computed(self, first: int, end: int) -> None:
        """Record that the engine has written the KV of these chunks."""
        with self._changed:
            self._ledger.computed(first, end)
            self._last_progress = time.monotonic()
            self._notify()

    @property
    def reusable_tokens(self) -> int:
        """Position at which the last pass begins."""
        with self._changed:
            return self._ledger.reusable_tokens

    def wait_layer(self, layer: int) -> bool:
        """Block until a layer of all chunks is delivered. False as soon as some chunk must be computed first."""
        with self._changed:
            self._wait_for(lambda: not self._ledger.open_by_layer[layer] or bool(self._ledger.untaken))
            return not self._ledger.open_by_layer[layer] and not self._ledger.untaken

    def wait(self) -> None:
        """Block until nothing more will arrive."""
        with self._changed:
            self._wait_for(lambda: not self._ledger.open_chunks)

    def planned_s(self) -> float:
        """Planned seconds until the engine's last pass ends; 0 without a plan."""
        with self._changed:
            return self._replanner.remaining_s() if self._replanner is not None else 0.0

    def end(self, reason: MissReason) -> None:
        """Abandon all open chunks with this reason, and stop the stages."""
        with self._changed:
            if self._ended:
                return
            self._give_up(reason)
            self._ended = True
            callbacks = [*self._end_callbacks, *self._ready_callbacks]
            self._end_callbacks, self._ready_callbacks = [], []
            self._notify()
        for callback in callbacks:
            callback()

    def report(self) -> FetchReport:
        with self._changed:
            return self._ledger.report(self._received_bytes)

    # ---- with the lock held

    def _adjust(self, *, idle: bool = False) -> None:
        if (
            self._replanner is not None
            and not self._ended
            and self._replanner.adjust(self._ledger.states, idle=idle)
        ):
            self._ledger.recount()
            self._notify()

    def _notify(self) -> None:
        self._version += 1
        self._changed.notify_all()

    def _give_up(self, reason: MissReason) -> None:
        self._ledger.give_up(reason)
        self._notify()

    def _tell_if_ready(self) -> None:
        """Call the `on_ready` callback if the engine need not wait. Called without the lock."""
        with self._changed:
            if not self._ready_callbacks or not self._ledger.is_ready:
                return
            callbacks, self._ready_callbacks = self._ready_callbacks, []
        for callback in callbacks:
            callback()

    def _wait_for(self, condition: Callable[[], bool]) -> None:
        self._engine_waits = True
        try:
            while not (condition() or self._ended):
                stalled_in_s = self._until_stalled_s()
                if stalled_in_s <= 0:
                    self._end_stalled()
                    return
                self._changed.wait(stalled_in_s)
        finally:
            self._engine_waits = False

    def _wait_for_news(self) -> None:
        version = self._version
        if self._ended or not self._ledger.open_chunks:  # only decoders remain: they finish or fail
            self._changed.wait_for(lambda: self._version != version)
        else:
            self._wait_for(lambda: self._version != version)

    def _until_stalled_s(self) -> float:
        return min(self._deadline, self._last_progress + self._stall_s) - time.monotonic()

    def _end_stalled(self) -> None:
        self._give_up(MissReason.TIMEOUT if time.monotonic() >= self._deadline else MissReason.STALLED)
