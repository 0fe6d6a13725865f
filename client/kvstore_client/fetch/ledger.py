"""Accounts for all chunks of one fetch: which are to be read, which the engine computes, which are delivered or
lost."""

import heapq
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace

from kvstore_api.placement import Member
from kvstore_client.fetch.base import ReadTask
from kvstore_client.fetch.chunk_state import ChunkState
from kvstore_client.fetch.cut import by_layers
from kvstore_client.fetch.replanner import Replanner
from kvstore_client.fetch.report import FetchReport
from kvstore_client.fetch.wanted import WantedFrames
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

    In layers with a sliding window, only the KV in the windows before a run and before the last pass is read. When the
    engine is to compute another chunk, the windows before that one are read, too; a chunk in them of which no more can
    be read is computed as well.
    """

    def __init__(
        self,
        chunks: Sequence[StoredChunk],
        layers: int,
        replanner: Replanner | None,
        skipped: Sequence[range],
        windows: Sequence[int | None],
    ) -> None:
        """`skipped` are positions that are not read, because the engine computes them in any case. `windows` are the
        sliding windows of the layers, empty if none has one; with windows the chunks have no gaps between them."""
        self.states = [
            ChunkState(index, layers, WantedFrames(chunk, skipped, windows))
            for index, chunk in enumerate(chunks)
        ]
        self._windows = any(state.wanted.has_windows for state in self.states[:1])
        self._given_up = False
        self._closed: set[Member] = set()
        """Members from which nothing more is read."""
        self.by_member: dict[Member, list[ChunkState]] = {}
        for state in self.states:
            self.by_member.setdefault(state.chunk.member, []).append(state)
        self._replanner = replanner
        for state in self.states:
            if not any(variant.is_decodable for variant in state.chunk.variants):
                state.is_lost, state.reason = True, MissReason.CALIBRATION_LOADING
        if self._windows:
            self._want_windows()
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
        self._bytes: Counter[Encoding] = Counter()
        self.recount()

    def recount(self) -> None:
        """Recount everything after a rare change of the chunks' sources."""
        if self._windows:
            self._read_windows()
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
            ordered = heapq.merge(*(state.unread for state in states), key=by_layers)
        tasks: list[ReadTask] = []
        size_bytes = 0
        for task in ordered:
            size_bytes += task.size_bytes
            if tasks and size_bytes > limit_bytes:
                break
            tasks.append(task)
        return [self.states[task.chunk_index].take() for task in tasks]

    def requeue(self, tasks: Sequence[ReadTask]) -> None:
        """Return reads that did not arrive, to be taken again."""
        back: dict[int, list[ReadTask]] = {}
        for task in tasks:
            back.setdefault(task.chunk_index, []).append(task)
        for index, tasks_of in back.items():
            if not self.states[index].to_compute:
                self.states[index].requeue(tasks_of)

    def may_read_more(self, member: Member) -> bool:
        """Whether more may have to be read from this member: a chunk that the engine is to compute in the current plan,
        or the windows before a chunk that is lost."""
        if self._windows and self.open_chunks:
            return True
        if self._replanner is None or not self._replanner.replan:
            return False
        return any(s.to_compute and not (s.is_taken or s.is_lost) for s in self.by_member[member])

    def close(self, member: Member) -> None:
        """Read nothing more from this member."""
        self._closed.add(member)
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
            self._bytes[task.encoding] += task.size_bytes
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

    def give_up(self, reason: MissReason) -> None:
        """Read nothing more: have the engine compute all chunks that are neither delivered nor taken."""
        self._given_up = True
        self.lose(range(len(self.states)), reason)

    def _want_windows(self) -> None:
        """Before anything is planned: want the windows before the chunks that cannot be read, and before the tokens
        behind the last chunk."""
        computed_from = self._end
        for state in reversed(self.states):
            state.wanted = replace(state.wanted, computed_from=computed_from)
            if state.is_lost:
                computed_from = state.chunk.first_token

    def _read_windows(self) -> None:
        """Read the windows before everything that the engine computes. Windows reach backwards only, so one pass from
        the last chunk to the first finds all chunks that must be computed as well."""
        computed_from = self._end
        for state in reversed(self.states):
            readable = not self._given_up and state.chunk.member not in self._closed
            if not state.read_before(computed_from, readable=readable):
                state.is_lost = True
                state.choose(COMPUTE)
            if state.to_compute:
                computed_from = state.chunk.first_token

    @property
    def _end(self) -> int:
        """Position behind the last chunk."""
        return self.states[-1].chunk.first_token + self.states[-1].tokens

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
            bytes_by_encoding=dict(self._bytes),
            fetched=sum(state.is_delivered and not state.to_compute for state in self.states),
            computed=sum(state.to_compute and state.reason is None for state in self.states),
            replans=self._replanner.replans if self._replanner is not None else 0,
        )
