"""What has come, what will come, and what the engine computes: the state that a fetch's stages and its engine share."""

import heapq
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress

from kvstore_api.placement import Member
from kvstore_client.fetch.base import ReadTask
from kvstore_client.fetch.chunk_state import ChunkState
from kvstore_client.fetch.replanner import Replanner
from kvstore_client.fetch.report import FetchReport
from kvstore_client.lookup import StoredChunk
from kvstore_client.planning import COMPUTE
from kvstore_client.timeline import Timeline
from kvstore_codec.encoding import Encoding

_PASS_TOKENS = 1024
"""The engine computes so many tokens of the front at a time: fewer make slow products, more could not be handed back
when the link gets faster."""


class FetchState:
    """The state of one fetch. Thread-safe.

    A chunk is read in one of its variants, or computed by the engine: as planned, or because it is missing. A fetch
    ends when everything is there or computed, at its deadline, when nothing arrived for `stall_s`, or by `end`.
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
    ) -> None:
        """`computed` are positions that are not read, because the engine computes them; not with a `replanner`."""
        self.timeline = timeline
        self._deadline = time.monotonic() + deadline_s
        self._stall_s = stall_s
        self._last_progress = time.monotonic()
        self._changed = threading.Condition()
        self._states = [ChunkState(index, chunk, layers, computed) for index, chunk in enumerate(chunks)]
        self._by_member: dict[Member, list[ChunkState]] = {}
        for state in self._states:
            self._by_member.setdefault(state.chunk.member, []).append(state)
        self._replanner = replanner
        if replanner is None or not replanner.begin(self._states):
            for state in self._states:
                state.choose(0)
        self._version = 0
        self._open_by_layer = [0] * layers
        """Tokens of each layer that have not been delivered, and that the engine does not compute."""
        self._open_chunks = 0
        """Those of which something is still to be read."""
        self._uncomputed = 0
        """Those that the engine is to compute and has not taken."""
        with self._changed:
            self._recount()
        self._engine_waits = False
        self._received_bytes = 0
        self._encodings: set[Encoding] = set()
        self._ended = False
        self._end_callbacks: list[Callable[[], object]] = []
        self._ready_callbacks: list[Callable[[], object]] = []

    @property
    def members(self) -> list[Member]:
        """Who has chunks of this fetch."""
        return list(self._by_member)

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

    def next_reads(self, member: Member, limit_bytes: float) -> list[ReadTask]:
        """What to ask this member for next, in the order it is needed: up to `limit_bytes`, one read at least. Waits
        while there is nothing but may be again. Empty when the fetch is over."""
        with self._changed:
            while not self._ended:
                for idle in (False, True):
                    self._adjust(idle=idle)
                    if tasks := self._next_reads(self._by_member[member], limit_bytes):
                        return tasks
                if self._replanner is None or not self._replanner.replan:
                    return []
                # An end sooner than the fetch's lets the stages' threads go, whose idling costs the engine.
                if not self._may_read(member):
                    for state in self._by_member[member]:  # nobody will be there to read what is computed now
                        state.is_lost |= state.is_computed
                    return []
                self._changed.wait()
            return []

    def give_back(self, tasks: Sequence[ReadTask]) -> None:
        """These reads were asked for and have not come: they are planned anew."""
        with self._changed:
            back: dict[int, list[ReadTask]] = {}
            for task in tasks:
                back.setdefault(task.chunk_index, []).append(task)
            for index, tasks_of in back.items():
                if not self._states[index].is_computed:
                    self._states[index].gave_back(tasks_of)
            self._adjust()
            self._notify()

    @property
    def received_bytes(self) -> int:
        with self._changed:
            return self._received_bytes

    def progress(self, received_bytes: int) -> None:
        with self._changed:
            self._received_bytes += received_bytes
            self._last_progress = time.monotonic()

    def moved(self, at_s: float) -> None:
        """Bytes came at this time, of a piece that is not complete."""
        with self._changed:
            self._last_progress = max(self._last_progress, at_s)

    def check_patience(self) -> None:
        """Called now and then: gives up what is too late, also when no engine waits for it."""
        with self._changed:
            if self._open_chunks and not self._ended and self._patience_s() <= 0:
                self._lose_patience()
        self._tell_if_ready()

    def begin_decode(self, task: ReadTask) -> bool:
        """Whether this read is still wanted. If so its place is the decoder's until `deliver` or `fail`."""
        with self._changed:
            state = self._states[task.chunk_index]
            if state.is_computed or self._ended:
                return False
            state.decoding += 1
            return True

    def deliver(self, task: ReadTask) -> bool:
        """What was decoded is in its place; whether its chunk is complete."""
        with self._changed:
            self._last_progress = time.monotonic()
            state = self._states[task.chunk_index]
            state.decoding -= 1
            if not state.is_computed:
                state.took(task)
                tokens = task.tokens.stop - task.tokens.start
                for layer in range(task.layers.start, task.layers.stop):
                    self._open_by_layer[layer] -= tokens
                self._open_chunks -= state.is_delivered
                self._encodings.add(task.encoding)
            self._notify()
            settled = state.is_settled
        if settled:
            self._tell_if_ready()
        return settled

    def fail(self, task: ReadTask, reason: str) -> None:
        """What was to be decoded will not be."""
        with self._changed:
            self._states[task.chunk_index].decoding -= 1
        self.fail_chunks([task], reason)

    def fail_chunks(self, tasks: Iterable[ReadTask], reason: str) -> None:
        """These reads will not come, so the engine computes their chunks; the first reason is kept."""
        with self._changed:
            for index in dict.fromkeys(task.chunk_index for task in tasks):
                if not self._ended:
                    self._lose(self._states[index], reason)
            self._recount()
        self._tell_if_ready()

    def on_end(self, callback: Callable[[], object]) -> None:
        """Call `callback` when the fetch ends, at once if it has."""
        with self._changed:
            if not self._ended:
                self._end_callbacks.append(callback)
                return
        callback()

    @contextmanager
    def until_end(self, callback: Callable[[], object]) -> Iterator[None]:
        """As `on_end`, while the block runs: a fetch may read from many streams, one after the other."""
        self.on_end(callback)
        try:
            yield
        finally:
            with self._changed, suppress(ValueError):  # it was called
                self._end_callbacks.remove(callback)

    # ---- called by the engine

    def on_ready(self, callback: Callable[[], object]) -> None:
        """Call `callback` once, when the engine would not have to wait: something is there to be computed, or nothing
        more will come."""
        with self._changed:
            if not (self._ended or self._is_ready()):
                self._ready_callbacks.append(callback)
                return
        callback()

    def next_to_compute(self) -> tuple[int, int] | None:
        """The next run of chunks `[first, end)` that the engine is to compute before its last pass, which begins behind
        the last chunk that is read. Waits until all before the run is there. None when there is no such run: the rest
        comes by itself, or is computed by the last pass."""
        with self._changed:
            for state in self._states:  # a last pass that was broken off had taken them
                state.is_engines &= state.is_delivered
            self._recount()
            self._adjust(idle=True)
            while True:
                last_read = self._last_read()
                first = next((s.index for s in self._states if s.is_computed and not s.is_engines), None)
                tail = self._states[last_read + 1 :]
                if first is None or first > last_read:
                    # What a decoder still writes must not be written over what the last pass puts there.
                    if not any(state.decoding for state in tail):
                        for state in tail:
                            state.is_engines = True
                        self._recount()
                        return None
                elif all(state.is_settled for state in self._states[:first]):
                    end = self._take_run(first)
                    if end is not None:
                        return first, end
                self._wait_for_news()

    def computed(self, first: int, end: int) -> None:
        """The engine has put these chunks in their place."""
        with self._changed:
            for state in self._states[first:end]:
                state.open_token_layers = 0
            if self._replanner is not None:
                self._replanner.engine_ended()
            self._last_progress = time.monotonic()
            self._recount()

    @property
    def reusable_tokens(self) -> int:
        """Where the last pass begins."""
        with self._changed:
            return sum(state.tokens for state in self._states[: self._last_read() + 1])

    def wait_layer(self, layer: int) -> bool:
        """Wait until a layer is there for all chunks. False as soon as any chunk must be computed first."""
        with self._changed:
            self._wait_for(lambda: not self._open_by_layer[layer] or bool(self._uncomputed))
            return not self._open_by_layer[layer] and not self._uncomputed

    def wait(self) -> None:
        """Wait until nothing more will come."""
        with self._changed:
            self._wait_for(lambda: not self._open_chunks)

    def planned_s(self) -> float:
        """Until the engine's last pass ends, as planned; 0 without a plan."""
        with self._changed:
            return self._replanner.remaining_s() if self._replanner is not None else 0.0

    def end(self, reason: str) -> None:
        """Give up what is still open, for `reason`, and stop the stages."""
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
            missing = {state.index: state.reason for state in self._states if state.reason is not None}
            delivered = 0
            while delivered < len(self._states) and self._states[delivered].is_delivered:
                delivered += 1
            return FetchReport(
                len(self._states),
                delivered,
                missing,
                self._received_bytes,
                frozenset(self._encodings),
                sum(state.is_delivered and not state.is_computed for state in self._states),
                sum(state.is_computed and state.reason is None for state in self._states),
                self._replanner.replans if self._replanner is not None else 0,
            )

    # ---- with the lock held

    def _may_read(self, member: Member) -> bool:
        """Whether a plan may still want what is not wanted now."""
        return any(s.is_computed and not (s.is_engines or s.is_lost) for s in self._by_member[member])

    def _next_reads(self, states: Sequence[ChunkState], limit_bytes: float) -> list[ReadTask]:
        """In the order of the plan."""
        if self._replanner is not None and self._replanner.order == "back":
            ordered: Iterable[ReadTask] = (task for state in reversed(states) for task in state.unread)
        else:
            ordered = heapq.merge(*(state.unread for state in states), key=_by_layers)
        tasks: list[ReadTask] = []
        size_bytes = 0
        for task in ordered:
            size_bytes += task.size_bytes
            if tasks and size_bytes > limit_bytes:
                break
            tasks.append(task)
        for task in tasks:
            self._states[task.chunk_index].unread.popleft()
        return tasks

    def _adjust(self, *, idle: bool = False) -> None:
        if (
            self._replanner is not None
            and not self._ended
            and self._replanner.adjust(self._states, idle=idle)
        ):
            self._recount()

    def _recount(self) -> None:
        """After what happens seldom: chunks come in another way than before."""
        self._open_by_layer = [0] * len(self._open_by_layer)
        self._open_chunks = self._uncomputed = 0
        for state in self._states:
            if not state.is_engines and state.open_token_layers:
                self._uncomputed += state.is_computed
                self._open_chunks += not state.is_computed
                for layer, tokens in enumerate(state.open_tokens):
                    self._open_by_layer[layer] += tokens
        self._notify()

    def _notify(self) -> None:
        self._version += 1
        self._changed.notify_all()

    def _lose(self, state: ChunkState, reason: str) -> None:
        if not state.is_delivered and state.reason is None and not state.is_engines:
            if not state.is_computed:
                state.reason = reason
            state.is_lost = True
            state.choose(COMPUTE)

    def _give_up(self, reason: str) -> None:
        for state in self._states:
            self._lose(state, reason)
        self._recount()

    def _last_read(self) -> int:
        """Index of the last chunk that is read, or has been computed; -1: none."""
        for state in reversed(self._states):
            if not state.is_computed or state.is_delivered:
                return state.index
        return -1

    def _take_run(self, first: int) -> int | None:
        """The end of the chunks for one pass of the engine from `first` on, which it has now. None while a decoder is
        in the way."""
        end, tokens = first, 0
        while end < len(self._states) and tokens < _PASS_TOKENS:
            state = self._states[end]
            if not state.is_computed or state.is_engines or state.decoding:
                break
            state.is_engines = True
            tokens += state.tokens
            end += 1
        if end == first:
            return None
        if self._replanner is not None:
            self._replanner.engine_began(self._states[first].chunk.first_token, tokens)
        self._recount()
        return end

    def _is_ready(self) -> bool:
        for state in self._states:
            if not state.is_settled:
                return False
            if state.is_computed and not state.is_delivered:
                return True
        return True

    def _tell_if_ready(self) -> None:
        """Without the lock."""
        with self._changed:
            if not self._ready_callbacks or not self._is_ready():
                return
            callbacks, self._ready_callbacks = self._ready_callbacks, []
        for callback in callbacks:
            callback()

    def _wait_for(self, condition: Callable[[], bool]) -> None:
        self._engine_waits = True
        try:
            while not (condition() or self._ended):
                patience_s = self._patience_s()
                if patience_s <= 0:
                    self._lose_patience()
                    return
                self._changed.wait(patience_s)
        finally:
            self._engine_waits = False

    def _wait_for_news(self) -> None:
        version = self._version
        if self._ended or not self._open_chunks:  # only decoders are in the way: they end, or fail
            self._changed.wait_for(lambda: self._version != version)
        else:
            self._wait_for(lambda: self._version != version)

    def _patience_s(self) -> float:
        return min(self._deadline, self._last_progress + self._stall_s) - time.monotonic()

    def _lose_patience(self) -> None:
        self._give_up("timeout" if time.monotonic() >= self._deadline else "stalled")


def _by_layers(task: ReadTask) -> tuple[int, int, int]:
    return task.layers.start, task.chunk_index, task.first_frame
