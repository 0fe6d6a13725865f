"""Accounts for all chunks of one fetch: which are to be read, which the engine computes, which are delivered or
lost."""

import heapq
from collections.abc import Iterable, Sequence

from kvstore_api.placement import Member
from kvstore_client.fetch.base import ReadTask
from kvstore_client.fetch.chunk_state import ChunkState
from kvstore_client.fetch.replanner import Replanner
from kvstore_client.fetch.report import FetchReport
from kvstore_client.match import StoredChunk
from kvstore_client.miss_reason import MissReason
from kvstore_client.planning import COMPUTE
from kvstore_codec.encoding import Encoding

_PASS_TOKENS = 1024
"""Number of leading tokens that the engine computes at a time: fewer make slow products, more could not be returned
when the link gets faster."""


class FetchLedger:
    """Tracks what each chunk of a fetch still needs. The caller holds the lock of `FetchState`; no method blocks."""

    def __init__(
        self,
        chunks: Sequence[StoredChunk],
        layers: int,
        replanner: Replanner | None,
        computed: Sequence[range],
    ) -> None:
        self.states = [ChunkState(index, chunk, layers, computed) for index, chunk in enumerate(chunks)]
        self.by_member: dict[Member, list[ChunkState]] = {}
        for state in self.states:
            self.by_member.setdefault(state.chunk.member, []).append(state)
        self._replanner = replanner
        for state in self.states:
            if not any(variant.is_decodable for variant in state.chunk.variants):
                state.is_lost, state.reason = True, MissReason.CALIBRATION_LOADING
        if replanner is None or not replanner.begin(self.states):
            for state in self.states:
                if not state.is_lost:
                    state.choose(0)
        self.open_by_layer = [0] * layers
        """Number of tokens, by layer, that are not delivered and that the engine does not compute."""
        self.open_chunks = 0
        """Number of chunks with outstanding reads."""
        self.uncomputed = 0
        """Number of chunks that the engine is to compute and has not taken yet."""
        self._encodings: set[Encoding] = set()
        self.recount()

    def recount(self) -> None:
        """Recount everything after a rare change of the chunks' sources."""
        self.open_by_layer = [0] * len(self.open_by_layer)
        self.open_chunks = self.uncomputed = 0
        for state in self.states:
            if not state.is_engines and state.open_token_layers:
                self.uncomputed += state.is_computed
                self.open_chunks += not state.is_computed
                for layer, tokens in enumerate(state.open_tokens):
                    self.open_by_layer[layer] += tokens

    # ---- reads

    def next_reads(self, member: Member, limit_bytes: float) -> list[ReadTask]:
        """Take the next reads from this member, in the order of the plan: up to `limit_bytes`, at least one read."""
        states = self.by_member[member]
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
            self.states[task.chunk_index].unread.popleft()
        return tasks

    def requeue(self, tasks: Sequence[ReadTask]) -> None:
        """Return reads that did not arrive, to be taken again."""
        back: dict[int, list[ReadTask]] = {}
        for task in tasks:
            back.setdefault(task.chunk_index, []).append(task)
        for index, tasks_of in back.items():
            if not self.states[index].is_computed:
                self.states[index].requeue(tasks_of)

    def may_read(self, member: Member) -> bool:
        """Whether a new plan may read chunks from this member that the engine is to compute in the current one."""
        return any(s.is_computed and not (s.is_engines or s.is_lost) for s in self.by_member[member])

    def leave(self, member: Member) -> None:
        """Read nothing more from this member; chunks of it that the engine is to compute stay the engine's."""
        for state in self.by_member[member]:
            state.is_lost |= state.is_computed

    def deliver(self, task: ReadTask) -> bool:
        """Record that the read is in its place. Returns whether no more of its chunk will arrive."""
        state = self.states[task.chunk_index]
        state.decoding -= 1
        if not state.is_computed:
            state.deliver(task)
            tokens = task.tokens.stop - task.tokens.start
            for layer in range(task.layers.start, task.layers.stop):
                self.open_by_layer[layer] -= tokens
            self.open_chunks -= state.is_delivered
            self._encodings.add(task.encoding)
        return state.is_settled

    def lose(self, indices: Iterable[int], reason: MissReason) -> None:
        """Have the engine compute these chunks, except those that are delivered or its own. The first reason is
        kept."""
        for index in indices:
            state = self.states[index]
            if not state.is_delivered and state.reason is None and not state.is_engines:
                if not state.is_computed:
                    state.reason = reason
                state.is_lost = True
                state.choose(COMPUTE)
        self.recount()

    # ---- chunks that the engine computes

    def return_last_pass(self) -> None:
        """Reopen the chunks of a last pass that the engine aborted."""
        for state in self.states:
            state.is_engines &= state.is_delivered
        self.recount()

    def first_to_compute(self) -> int | None:
        """Index of the first chunk that the engine is to compute before its last pass."""
        first = next((s.index for s in self.states if s.is_computed and not s.is_engines), None)
        return None if first is None or first > self.last_read() else first

    def is_settled_before(self, index: int) -> bool:
        return all(state.is_settled for state in self.states[:index])

    def take_last_pass(self) -> bool:
        """Assign all chunks behind the last fetched one to the engine's last pass. False while a decoder still writes
        there: it must not overwrite what the last pass computes."""
        tail = self.states[self.last_read() + 1 :]
        if any(state.decoding for state in tail):
            return False
        for state in tail:
            state.is_engines = True
        self.recount()
        return True

    def take_run(self, first: int) -> int | None:
        """Assign a run of chunks from `first` on to one pass of the engine, and return its end. None while a decoder
        still writes there."""
        end, tokens = first, 0
        while end < len(self.states) and tokens < _PASS_TOKENS:
            state = self.states[end]
            if not state.is_computed or state.is_engines or state.decoding:
                break
            state.is_engines = True
            tokens += state.tokens
            end += 1
        if end == first:
            return None
        if self._replanner is not None:
            self._replanner.engine_began(self.states[first].chunk.first_token, tokens)
        self.recount()
        return end

    def computed(self, first: int, end: int) -> None:
        """Record that the engine has written the KV of these chunks."""
        for state in self.states[first:end]:
            state.open_token_layers = 0
        if self._replanner is not None:
            self._replanner.engine_ended()
        self.recount()

    def last_read(self) -> int:
        """Index of the last chunk that is fetched or was computed; -1 for none."""
        for state in reversed(self.states):
            if not state.is_computed or state.is_delivered:
                return state.index
        return -1

    @property
    def reusable_tokens(self) -> int:
        """Number of tokens up to the end of the last chunk that is fetched or was computed."""
        return sum(state.tokens for state in self.states[: self.last_read() + 1])

    @property
    def is_ready(self) -> bool:
        """Whether the engine would not wait: there is a chunk to compute, or nothing more will arrive."""
        for state in self.states:
            if not state.is_settled:
                return False
            if state.is_computed and not state.is_delivered:
                return True
        return True

    def report(self, received_bytes: int) -> FetchReport:
        missing = {state.index: state.reason for state in self.states if state.reason is not None}
        delivered = 0
        while delivered < len(self.states) and self.states[delivered].is_delivered:
            delivered += 1
        return FetchReport(
            len(self.states),
            delivered,
            missing,
            received_bytes,
            frozenset(self._encodings),
            sum(state.is_delivered and not state.is_computed for state in self.states),
            sum(state.is_computed and state.reason is None for state in self.states),
            self._replanner.replans if self._replanner is not None else 0,
        )


def _by_layers(task: ReadTask) -> tuple[int, int, int]:
    return task.layers.start, task.chunk_index, task.first_frame
