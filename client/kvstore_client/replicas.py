"""Search for chunks: at their best reader, or at another member that has them."""

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from queue import Empty, SimpleQueue
from typing import NamedTuple

import grpc

from kvstore_api.placement import Member
from kvstore_api.v1 import kvstore_pb2 as pb
from kvstore_client.cluster_view import ClusterView
from kvstore_client.grpc_failure import predicate_of
from kvstore_client.request_trace import lookup_metadata
from kvstore_client.settings import ClientSettings
from kvstore_codec.canonical import DIGEST_BYTES
from kvstore_codec.errors import NodeUnavailableError
from kvstore_codec.identity import ChunkId

Take = Callable[[int, Member, pb.LookupAnswer], bool]
"""Called with a chunk's index, the member that has it, and its answer; returns whether the answer is usable.

A chunk with a usable answer is requested from no further member, unless the answer is for another context. It may then
be called a second time, with an answer for the chunk's own context."""
Groups = dict[str, tuple[Member, list[int]]]
"""Members to ask and the indices of their chunks, by node_id."""

# Bytes before the two ids of a chunk in a serialised LookupRequest: protocol buffer tags and lengths.
_PREFIX_ID = bytes([2 << 3 | 2, DIGEST_BYTES])
_CHUNK = bytes([1 << 3 | 2, 2 * (2 + DIGEST_BYTES), 1 << 3 | 2, DIGEST_BYTES])


class Lease(NamedTuple):
    """A node's promise to keep, for a while, all that it has of the requested chunks."""

    member: Member
    lease_id: bytes
    asked: Sequence[int]
    """Indices of the requested chunks."""
    used: bytes = b""
    """Which of them are used: bit i % 8 of byte i / 8, lowest bit first."""
    tokens: int = 0
    """Number of tokens in the used chunks."""


class _Question(NamedTuple):
    """A call in progress, its chunks and its start time."""

    member: Member
    asked: Sequence[int]
    asked_at_s: float


class Search:
    """Looks chunks up on all their readers, within one deadline, `lookup_timeout_s`.

    A chunk is requested from its best reader. A chunk that this reader does not have, fails to report, or has not
    reported after `failover_s` is requested from all its other readers at once: no caller waits for a dead node while
    another lives, and a text that is stored nowhere costs two rounds. Paused readers are skipped, unless another one is
    unreachable: then a reader that was paused for being slow may have the only copy. A reader that fails now is paused.

    Nodes may have the KV of a chunk's tokens computed after other tokens: in another context. A chunk for which only
    such KV was found is requested once more, in its own context, from its other readers. The search does not wait for a
    reader that is silent for longer than `failover_s` when every chunk requested from it was found in any context.
    """

    def __init__(
        self,
        view: ClusterView,
        settings: ClientSettings,
        chunk_ids: Sequence[ChunkId],
        encodings: Sequence[str],
        take: Take,
        *,
        all_encodings: bool = False,
        any_context: bool = False,
        peek: bool = False,
    ) -> None:
        """With `all_encodings` answers list every stored one of `encodings`, or of all encodings when that is empty.
        With `any_context` answers may be for another context of a chunk's tokens. A `peek` changes nothing on the
        nodes: it takes no lease and is not recorded as a use."""
        self.leases: list[Lease] = []
        """Leases, also on chunks that were not taken. Nothing counts as used until the nodes are told."""
        self.asked = 0
        """Number of calls made."""
        self.why_paused = ""
        """Why a skipped reader was paused."""
        self.failures: list[str] = []
        """Reasons of failed calls, a sentence each."""
        self._view, self._settings = view, settings
        self._chunk_ids, self._encodings, self._take = chunk_ids, encodings, take
        self._all_encodings, self._any_context, self._peek = all_encodings, any_context, peek
        self._found: set[int] = set()
        self._found_elsewhere: set[int] = set()
        """Chunks found only in another context."""
        self._others: dict[int, Sequence[Member]] = {}
        self._slow: dict[int, Sequence[Member]] = {}
        self._open: dict[grpc.Future, _Question] = {}
        self._answered: SimpleQueue[grpc.Future | None] = SimpleQueue()
        self._any_answer = False
        self._silence_limit_s = min(settings.timeouts.failover_s, settings.timeouts.lookup_s / 2)
        self._deadline_s = 0.0

    def run(
        self,
        indices: Iterable[int],
        tried: Mapping[int, Iterable[Member]] | None = None,
        timeout_s: float = math.inf,
    ) -> None:
        """Look for the chunks at `indices`, except at the members in `tried`, for at most `timeout_s`. Called once.

        Raises NodeUnavailableError when the cluster has no node, or when a reader failed and none answered. Returns
        normally, without an answer, when there was no reader to ask, when the search was aborted, or when the time was
        so short that a silent reader does not count as failed.
        """
        self._deadline_s = time.monotonic() + min(self._settings.timeouts.lookup_s, timeout_s)
        self._ask(self._best(list(indices), tried or {}))
        # Until then the search waits for every reader, even if all chunks are found, so that a silent one is paused.
        hurry_s = time.monotonic() + self._silence_limit_s
        hurried = aborted = False
        while self._open and not (hurried and self._is_settled()):
            until_s = self._deadline_s if hurried else min(hurry_s, self._deadline_s)
            try:
                call = self._answered.get(timeout=max(0.0, until_s - time.monotonic()))
            except Empty:
                if time.monotonic() >= self._deadline_s:
                    break
                hurried = True
                waiting = [index for question in self._open.values() for index in question.asked]
                self._ask(self._next(waiting, failing=True))
            else:
                if call is None:
                    aborted = True
                    break
                missing, failing = self._missing(call)
                self._ask(self._next(missing, failing=failing))
        for call, question in self._open.items():
            call.cancel()
            if not aborted:
                self._fail(question, "did not answer in time")
        if self.failures:
            self._view.refresh()
            if not self._any_answer:
                raise NodeUnavailableError(self.failures[0])

    def cancel(self) -> None:
        """Abort the search from any thread. Readers whose answers are outstanding are not paused."""
        self._answered.put(None)

    def _best(self, wanted: Sequence[int], tried: Mapping[int, Iterable[Member]]) -> Groups:
        """The first reader of each chunk that is not paused; the others are kept for later."""
        contents = [self._chunk_ids[index].content_id for index in wanted]
        rows = self._view.readers(contents, self._deadline_s - time.monotonic())
        # Equal rows are one object, and few: thousands of chunks are sorted without comparing members.
        unlike = {id(row): row for row in rows}
        paused = {m for row in unlike.values() for m in row if self._view.is_paused(m.endpoint)}
        if paused:
            self.why_paused = self._view.why_paused(min(member.endpoint for member in paused))
        away = {member for member in paused if self._view.is_out_of_reach(member.endpoint)}
        slow = {key: [m for m in row if m in paused and m not in away] for key, row in unlike.items()}
        usable = {key: [m for m in row if m not in paused] for key, row in unlike.items()}
        for key, row in unlike.items():
            if not away.isdisjoint(row):
                usable[key] += slow.pop(key)
        best: Groups = {}
        for index, row in zip(wanted, rows, strict=True):
            members, reserve = usable[id(row)], slow.get(id(row), ())
            if index in tried:
                members = [member for member in members if member not in tried[index]]
                reserve = [member for member in reserve if member not in tried[index]]
            if reserve:
                self._slow[index] = reserve
            if members:
                best.setdefault(members[0].node_id, (members[0], []))[1].append(index)
                self._others[index] = members[1:]
        return best

    def _next(self, indices: Iterable[int], *, failing: bool) -> Groups:
        """Readers of these chunks that were not asked yet, including the slow ones after a failure."""
        groups: Groups = {}
        for index in indices:
            slow = self._slow.pop(index, ()) if failing else ()
            for member in (*self._others.pop(index, ()), *slow):
                groups.setdefault(member.node_id, (member, []))[1].append(index)
        return groups

    def _ask(self, groups: Groups) -> None:
        for member, asked in groups.values():
            nowhere = [index for index in asked if index not in self._found_elsewhere]
            if nowhere:
                self._call(member, nowhere, any_context=self._any_context)
            if len(nowhere) < len(asked):
                elsewhere = [index for index in asked if index in self._found_elsewhere]
                self._call(member, elsewhere, any_context=False)

    def _call(self, member: Member, asked: Sequence[int], *, any_context: bool) -> None:
        request = pb.LookupRequest(
            lease_ms=0 if self._peek else round(self._settings.fetch.lease_s * 1000),
            with_headers=True,
            encodings=self._encodings,
            all_encodings=self._all_encodings,
            any_context=any_context,
            peek=self._peek,
            use_follows=not self._peek,
            tenant=self._view.tenant,
        )
        request.MergeFromString(asked_chunks(self._chunk_ids[index] for index in asked))
        now_s = time.monotonic()
        call = self._view.storage(member.endpoint).Lookup.future(
            request, timeout=self._deadline_s - now_s, metadata=lookup_metadata()
        )
        self._open[call] = _Question(member, asked, now_s)
        self.asked += 1
        call.add_done_callback(self._answered.put)

    def _missing(self, call: grpc.Future) -> tuple[list[int], bool]:
        """Take a call's answers. Returns the requested chunks that were not found, and whether the call failed."""
        question = self._open.pop(call)
        member, asked = question.member, question.asked
        failing = False
        try:
            reply = call.result()
        except (grpc.RpcError, grpc.FutureCancelledError):
            failing = True
            self._fail(question, predicate_of(call), late=call.code() == grpc.StatusCode.DEADLINE_EXCEEDED)
        else:
            self._any_answer = True
            if reply.lease_id:
                self.leases.append(Lease(member, reply.lease_id, asked))
            for index, answer in zip(asked, reply.answers, strict=False):
                if answer.encoding and index not in self._found and self._take(index, member, answer):
                    (self._found_elsewhere if answer.prefix_id else self._found).add(index)
        return [index for index in asked if index not in self._found], failing

    def _is_settled(self) -> bool:
        """Whether every chunk of an open call was found, in its own or in another context."""
        return all(
            index in self._found or index in self._found_elsewhere
            for question in self._open.values()
            for index in question.asked
        )

    def _fail(self, question: _Question, reason: str, *, late: bool = True) -> None:
        """Pause a failed reader. A call that is only `late`, and had less time than `_silence_limit_s`, is ignored.
        Other errors always pause the reader."""
        if late and time.monotonic() - question.asked_at_s < self._silence_limit_s:
            return
        why = f"the storage node at {question.member.endpoint} {reason}"
        self.failures.append(why)
        self._view.pause(question.member.endpoint, why, until_it_answers=True)


def asked_chunks(chunk_ids: Iterable[ChunkId]) -> bytes:
    """The chunks of a LookupRequest, serialised: creating a message for each takes four times as long."""
    parts: list[bytes] = []
    for chunk_id in chunk_ids:
        parts += (_CHUNK, chunk_id.content_id, _PREFIX_ID, chunk_id.prefix_id)
    return b"".join(parts)
