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
from kvstore_client.planning.predict import PASS_TOKENS
from kvstore_codec.encoding import Encoding

_FIRST_VARIANT = 0
"""The variant in which every chunk is read when there is no plan."""


class FetchLedger:
    """Tracks what each chunk of a fetch still needs; `ChunkState` defines the states of a chunk. The caller holds the
    lock of `FetchState`; no method blocks.

    The engine computes chunks in *runs* before its *last pass*. The last pass is the forward pass that produces the
    first new token. It computes all tokens after the last chunk that is read or was computed in a run.
    """

    def __init__(
        self,
        chunks: Sequence[StoredChunk],
        layers: int,
        replanner: Replanner | None,
        skipped: Sequence[range],
    ) -> None:
        """`skipped` are positions that are not read, because the engine computes them in any case."""
        self.states = [ChunkState(index, chunk, layers, skipped) for index, chunk in enumerate(chunks)]
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
                    state.choose(_FIRST_VARIANT)
        self.open_by_layer = [0] * layers
        """Number of tokens, by layer, that are neither delivered nor taken by the engine."""
        self.open_chunks = 0
        """Number of chunks that are to be read and are not delivered."""
        self.untaken = 0
        """Number of chunks that the engine is to compute and has not taken."""
        self._encodings: set[Encoding] = set()
        self.recount()

    def recount(self) -> None:
        """Recount everything after a rare change of the chunks' sources."""
        self.open_by_layer = [0] * len(self.open_by_layer)
        self.open_chunks = self.untaken = 0
        for state in self.states:
            if not state.is_taken and state.open_token_layers:
                self.untaken += state.to_compute
                self.open_chunks += not state.to_compute
                for layer, tokens in enumerate(state.open_tokens):
                    self.open_by_layer[layer] += tokens

    # ---- reads

    def next_reads(self, member: Member, limit_bytes: float) -> list[ReadTask]:
        """Take the next reads from this member, in the order of the plan: up to `limit_bytes`, at least one read."""
        states = self.by_member[member]
        order = "layers" if self._replanner is None else self._replanner.order
        if order != "layers":
            one_by_one = states if order == "front" else reversed(states)
            ordered: Iterable[ReadTask] = (task for state in one_by_one for task in state.unread)
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
            if not self.states[index].to_compute:
                self.states[index].requeue(tasks_of)

    def can_switch_to_reading(self, member: Member) -> bool:
        """Whether a new plan could still read a chunk of this member that the engine is to compute in the current
        plan."""
        return any(s.to_compute and not (s.is_taken or s.is_lost) for s in self.by_member[member])

    def forbid_switching(self, member: Member) -> None:
        """Let no later plan read the chunks of this member that the engine is to compute."""
        for state in self.by_member[member]:
            state.is_lost |= state.to_compute

    def deliver(self, task: ReadTask) -> bool:
        """Record that the read is in its place. Returns whether no more of its chunk will arrive."""
        state = self.states[task.chunk_index]
        state.decoding -= 1
        if not state.to_compute:
            state.deliver(task)
            tokens = task.tokens.stop - task.tokens.start
            for layer in range(task.layers.start, task.layers.stop):
                self.open_by_layer[layer] -= tokens
            self.open_chunks -= state.is_delivered
            self._encodings.add(task.encoding)
        return state.is_settled

    def lose(self, indices: Iterable[int], reason: MissReason) -> None:
        """Have the engine compute these chunks, except those that are delivered or taken by the engine. The first
        reason is kept."""
        for index in indices:
            state = self.states[index]
            if not state.is_delivered and state.reason is None and not state.is_taken:
                if not state.to_compute:
                    state.reason = reason
                state.is_lost = True
                state.choose(COMPUTE)
        if self._replanner is not None and self._replanner.order == "front":
            self._leave_rest()
        self.recount()

    def _leave_rest(self) -> None:
        """Have the engine, which uses leading chunks only, compute everything behind the first lost one."""
        first = next((state.index for state in self.states if state.is_lost), len(self.states))
        for state in self.states[first:]:
            if not state.is_delivered:
                state.is_lost = True
                state.choose(COMPUTE)

    # ---- chunks that the engine computes

    def return_last_pass(self) -> None:
        """Record that the engine aborted its last pass: the chunks that it had taken and not computed are no longer
        taken."""
        for state in self.states:
            state.is_taken &= state.is_delivered
        self.recount()

    def first_to_compute(self) -> int | None:
        """Index of the first chunk that the engine is to compute before its last pass."""
        first = next((s.index for s in self.states if s.to_compute and not s.is_taken), None)
        return None if first is None or first > self.last_reusable() else first

    def is_settled_before(self, index: int) -> bool:
        return all(state.is_settled for state in self.states[:index])

    def take_last_pass(self) -> bool:
        """Mark all chunks after the last reusable one as taken by the engine's last pass. False while a decoder still
        writes to one of them: it must not overwrite the KV that the last pass computes."""
        tail = self.states[self.last_reusable() + 1 :]
        if any(state.decoding for state in tail):
            return False
        for state in tail:
            state.is_taken = True
        self.recount()
        return True

    def take_run(self, first: int) -> int | None:
        """Mark a run of about PASS_TOKENS from chunk `first` on as taken by one pass of the engine. Return the index
        after its last chunk. None while a decoder still writes to the first chunk."""
        end, tokens = first, 0
        while end < len(self.states) and tokens < PASS_TOKENS:
            state = self.states[end]
            if not state.to_compute or state.is_taken or state.decoding:
                break
            state.is_taken = True
            tokens += state.tokens
            end += 1
        if end == first:
            return None
        if self._replanner is not None:
            self._replanner.engine_began(self.states[first].chunk.first_token, tokens)
        self.recount()
        return end

    def computed(self, first: int, end: int) -> None:
        """Record that the engine has computed the chunks `[first, end)` and written their KV to the destination."""
        for state in self.states[first:end]:
            state.open_token_layers = 0
        if self._replanner is not None:
            self._replanner.engine_ended()
        self.recount()

    def last_reusable(self) -> int:
        """Index of the last chunk that is read or was computed in a run; -1 for none. The last pass begins after it."""
        for state in reversed(self.states):
            if not state.to_compute or state.is_delivered:
                return state.index
        return -1

    @property
    def reusable_tokens(self) -> int:
        """Number of tokens up to the end of the last reusable chunk."""
        return sum(state.tokens for state in self.states[: self.last_reusable() + 1])

    @property
    def is_ready(self) -> bool:
        """Whether the engine would not wait: there is a chunk to compute, or nothing more will arrive."""
        for state in self.states:
            if not state.is_settled:
                return False
            if state.to_compute and not state.is_delivered:
                return True
        return True

    def report(self, received_bytes: int) -> FetchReport:
        missing = {state.index: state.reason for state in self.states if state.reason is not None}
        delivered = 0
        while delivered < len(self.states) and self.states[delivered].is_delivered:
            delivered += 1
        return FetchReport(
            chunks=len(self.states),
            delivered=delivered,
            missing=missing,
            received_bytes=received_bytes,
            encodings=frozenset(self._encodings),
            fetched=sum(state.is_delivered and not state.to_compute for state in self.states),
            computed=sum(state.to_compute and state.reason is None for state in self.states),
            replans=self._replanner.replans if self._replanner is not None else 0,
        )


def _by_layers(task: ReadTask) -> tuple[int, int, int]:
    return task.layers.start, task.chunk_index, task.first_frame
