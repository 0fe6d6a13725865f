"""The thread of a storage node that keeps its chunks on all of their owners."""

import logging
import threading
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from kvstore_api.placement import Member, Membership, Placement
from kvstore_cluster.background import BackgroundLoop
from kvstore_cluster.coordinator import Directives
from kvstore_cluster.repair.base import LocalInventory, Outcome, PeerNodes
from kvstore_cluster.repair.pace import Pace
from kvstore_cluster.repair.walk import Need, Survey
from kvstore_cluster.stored import StoredVariant
from kvstore_codec.errors import KVStoreError, NodeUnavailableError

log = logging.getLogger(__name__)

DEFAULT_PERIOD_S = 300.0
# Nodes that come seldom do so alone, and most that go come back with their disks.
_SETTLE_S = 0.5
_SETTLE_LOST_S = 3.0
_RETRY_S = 5.0
_DRAIN_PERIOD_S = 1.0
# Clients with the membership of before go on putting for a while after a change.
_LATE_PUTS_S = 10.0
_PAGE = 1024


@dataclass(frozen=True, slots=True)
class _Walk:
    """`gentle`: a full node gets nothing. Where nothing has happened, it has evicted what it lacks and would do so
    again; and what a draining node gives shall stay where it is given."""

    membership: Membership
    repair_round: int
    draining: bool
    gentle: bool


@dataclass(frozen=True, slots=True)
class _Given:
    """Variants of which an owner is `short` still, those of them that it was `denied`, and copies that `failed`."""

    short: int
    denied: int
    failed: int


@dataclass(slots=True)
class RepairCounters:
    """Only ever grow. Copies `refused` found a full node or quota, `failed` ones are tried again."""

    repair_sent: int = 0
    repair_sent_bytes: int = 0
    repair_refused: int = 0
    repair_failed: int = 0


class RepairWorker:
    """Walks through all that `node` has, asks the other owners what they lack, and sends it, at most `bytes_per_s` on
    average: when the membership has changed, in every round of repair, and every `period_s`. A draining node does it
    again and again. A walk of which the membership is old is given up; the next one finds what is there already.

    Runs from `start` to `stop`. Thread-safe.
    """

    def __init__(
        self,
        node: LocalInventory,
        peers: PeerNodes,
        *,
        bytes_per_s: float,
        period_s: float = DEFAULT_PERIOD_S,
    ) -> None:
        self._node = node
        self._peers = peers
        self._pace = Pace(bytes_per_s)
        self._period_s = period_s
        self._changed = threading.Condition()
        self._membership: Membership | None = None
        self._repair_round = 0
        self._due_s = 0.0  # of the next walk
        self._walk: _Walk | None = None  # under way
        self._finished: _Walk | None = None  # the last one that was not given up
        self._complete: _Walk | None = None  # the last one in which every node answered
        self._checked = 0
        self._left = 0  # variants that an owner lacked after the last walk; before it, while draining
        self._stuck = 0  # those of them that nobody took
        self._counters = RepairCounters()
        self._loop = BackgroundLoop("kvstore-repair", self._walk_when_due, wake=self._interrupt)

    def start(self) -> None:
        self._loop.start()

    def stop(self) -> None:
        """Ends the copy under way."""
        self._loop.stop()

    def update(self, directives: Directives) -> None:
        """What the coordinator says now; called every second or so."""
        with self._changed:
            if directives.membership != self._membership:
                lost = _names(self._membership) - _names(directives.membership)
                self._membership = directives.membership
                self._due_s = time.monotonic() + (_SETTLE_LOST_S if lost else _SETTLE_S)
            elif directives.repair_round != self._repair_round:
                self._due_s = time.monotonic()
            self._repair_round = directives.repair_round
            self._changed.notify_all()

    def gauges(self, chunks: int) -> dict[str, int]:
        """`chunks` is how many variants the node has. `repair_round` and `repair_epoch` are those of the last walk in
        which every other node answered. A draining node has `draining` 1, and `drain_left` variants that an owner
        lacked when it looked last: at 0 it may go. `drain_stuck` of them no other node takes."""
        with self._changed:
            draining = self._is_draining()
            known = self._finished is not None and self._finished.membership == self._membership
            return {
                "repair_round": self._complete.repair_round if self._complete else 0,
                "repair_epoch": self._complete.membership.epoch if self._complete else 0,
                "repair_running": int(self._walk is not None),
                "repair_checked": self._checked,
                "repair_total": max(chunks, self._checked),
                "repair_left": self._left,
                "draining": int(draining),
                "drain_left": (self._left if known else chunks) if draining else 0,
                "drain_stuck": self._stuck if draining and known else 0,
            }

    def counters(self) -> dict[str, int]:
        with self._changed:
            return {name: getattr(self._counters, name) for name in RepairCounters.__slots__}

    def _interrupt(self) -> None:
        with self._changed:
            self._changed.notify_all()
        self._peers.close()

    def _walk_when_due(self) -> None:
        walk = self._next()
        if walk is None:
            return
        complete = False
        try:
            complete = self._look_through(walk)
        except KVStoreError as error:
            log.warning("repair stopped and will go on later: %s", error)
        finally:
            with self._changed:
                self._walk = None
                if not self._is_old(walk):
                    if complete:
                        self._complete = walk
                    if self._repair_round == walk.repair_round:
                        self._due_s = time.monotonic() + self._pause_s(walk, complete=complete)

    def _pause_s(self, walk: _Walk, *, complete: bool) -> float:
        """Until the next walk."""
        if self._is_draining():
            return _DRAIN_PERIOD_S
        if not complete:
            return min(_RETRY_S, self._period_s)
        return self._period_s if walk.gentle else min(_LATE_PUTS_S, self._period_s)

    def _next(self) -> _Walk | None:
        """Waits until a walk is due; None when stopped."""
        with self._changed:
            while not self._loop.stopping.is_set():
                left_s = None
                if self._membership is not None:
                    left_s = self._due_s - time.monotonic()
                    if left_s <= 0:
                        self._checked = 0
                        draining = self._is_draining()
                        gentle = draining or self._nothing_happened()
                        self._walk = _Walk(self._membership, self._repair_round, draining, gentle)
                        return self._walk
                self._changed.wait(left_s)
            return None

    def _nothing_happened(self) -> bool:
        last = self._complete
        now = (self._membership, self._repair_round)
        return last is not None and (last.membership, last.repair_round) == now

    def _look_through(self, walk: _Walk) -> bool:
        """True when every node that was asked answered; False as well when the walk was given up."""
        placement = Placement(walk.membership.members, walk.membership.replicas)
        survey = Survey(self._node.node_id, placement, self._peers)
        cursor = left = stuck = unclear = 0
        while True:
            began_s = time.monotonic()
            variants, cursor = self._node.list(cursor, _PAGE)
            findings = survey.page(variants)
            unclear += findings.unclear
            left += findings.lacking + findings.unclear
            took_s = time.monotonic() - began_s
            given = self._give(walk, findings.needs)
            if given is None:
                return False
            unclear += given.failed
            stuck += findings.homeless + given.denied
            if not walk.draining:  # else the next walk sees whether it is still where it was given
                left -= len(findings.needs) - given.short
            with self._changed:
                self._checked += len(variants)
                if not cursor:
                    self._finished, self._left, self._stuck = walk, left, stuck
                    return not unclear
            # The node answers clients with the other half of the time.
            if not self._wait(walk, took_s):
                return False

    def _give(self, walk: _Walk, needs: Sequence[Need]) -> _Given | None:
        """None when the walk is given up."""
        wanting: dict[Member, list[StoredVariant]] = defaultdict(list)
        for need in needs:
            for owner in need.owners:
                wanting[owner].append(need.variant)
        short: set[int] = set()  # variants that an owner still lacks
        denied: set[int] = set()
        failed = 0
        for owner, wanted in wanting.items():
            fitting = self._fitting(owner, wanted) if walk.gentle else len(wanted)
            variants = wanted[:fitting]
            denied.update(id(variant) for variant in wanted[fitting:])
            for burst in self._pace.bursts(variants):
                if not self._wait(walk, self._pace.wait_s(time.monotonic())):
                    return None
                outcomes = self._peers.push(owner, burst)
                self._count(burst, outcomes)
                failed += outcomes.count(Outcome.FAILED)
                for variant, outcome in zip(burst, outcomes, strict=True):
                    if outcome is Outcome.REFUSED:
                        denied.add(id(variant))
                    elif outcome is Outcome.FAILED:
                        short.add(id(variant))
        return _Given(len(short | denied), len(denied), failed)

    def _fitting(self, owner: Member, variants: Sequence[StoredVariant]) -> int:
        """How many of these the owner has room for, from the first on. All for one that does not answer: then they
        fail."""
        try:
            room_bytes = self._peers.room_bytes(owner)
        except NodeUnavailableError:
            return len(variants)
        return sum(end <= room_bytes for end in accumulate(variant.size_bytes for variant in variants))

    def _count(self, variants: Sequence[StoredVariant], outcomes: Sequence[Outcome]) -> None:
        sent_bytes = sum(
            variant.size_bytes
            for variant, outcome in zip(variants, outcomes, strict=True)
            if outcome is Outcome.SENT
        )
        self._pace.sent(sent_bytes, time.monotonic())
        with self._changed:
            self._counters.repair_sent += outcomes.count(Outcome.SENT)
            self._counters.repair_sent_bytes += sent_bytes
            self._counters.repair_refused += outcomes.count(Outcome.REFUSED)
            self._counters.repair_failed += outcomes.count(Outcome.FAILED)

    def _wait(self, walk: _Walk, wait_s: float) -> bool:
        """False as soon as the walk is to be given up."""
        with self._changed:
            return not self._changed.wait_for(
                lambda: self._loop.stopping.is_set() or self._is_old(walk), wait_s
            )

    def _is_old(self, walk: _Walk) -> bool:
        return self._loop.stopping.is_set() or walk.membership != self._membership

    def _is_draining(self) -> bool:
        members = self._membership.members if self._membership is not None else ()
        return any(member.node_id == self._node.node_id and member.draining for member in members)


def _names(membership: Membership | None) -> set[str]:
    return {member.node_id for member in membership.members} if membership is not None else set()
