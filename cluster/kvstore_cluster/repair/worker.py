"""The thread of a storage node that keeps its chunks on all of their owners."""

import logging
import threading
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from kvstore_api.placement import Member, Membership, Placement
from kvstore_cluster.coordinator import Directives
from kvstore_cluster.repair.base import Outcome, PeerNodes, Stock
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
    """`gentle`: nothing has happened, so what a full node lacks it has evicted, and does not get again."""

    membership: Membership
    repair_round: int
    gentle: bool


@dataclass(frozen=True, slots=True)
class _Given:
    """Variants of which an owner is `short` still, and copies that `failed`."""

    short: int
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
        self, node: Stock, peers: PeerNodes, *, bytes_per_s: float, period_s: float = DEFAULT_PERIOD_S
    ) -> None:
        self._node = node
        self._peers = peers
        self._pace = Pace(bytes_per_s)
        self._period_s = period_s
        self._changed = threading.Condition()
        self._stopped = False
        self._membership: Membership | None = None
        self._repair_round = 0
        self._due_s = 0.0  # of the next walk
        self._walk: _Walk | None = None  # under way
        self._finished: _Walk | None = None  # the last one that was not given up
        self._complete: _Walk | None = None  # the last one in which every node answered
        self._checked = 0
        self._left = 0  # variants that an owner lacked after the last walk
        self._counters = RepairCounters()
        self._thread = threading.Thread(target=self._run, name="kvstore-repair", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Ends the copy under way."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        self._peers.close()
        self._thread.join()

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
        which every other node answered. A draining node has `draining` 1, and `drain_left` variants that an owner still
        lacks, as far as it knows: at 0 it may go."""
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
            }

    def counters(self) -> dict[str, int]:
        with self._changed:
            return {name: getattr(self._counters, name) for name in RepairCounters.__slots__}

    def _run(self) -> None:
        while (walk := self._next()) is not None:
            try:
                complete = self._look_through(walk)
            except KVStoreError as error:
                log.warning("repair stopped and will go on later: %s", error)
                complete = False
            except Exception:  # a mistake of ours; nobody waits for this, so it is said here
                log.exception("repair stopped and will go on later")
                complete = False
            with self._changed:
                self._walk = None
                if self._is_old(walk):
                    continue
                self._finished = walk
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
            while not self._stopped:
                left_s = None
                if self._membership is not None:
                    left_s = self._due_s - time.monotonic()
                    if left_s <= 0:
                        self._checked = 0
                        self._walk = _Walk(self._membership, self._repair_round, self._nothing_happened())
                        return self._walk
                self._changed.wait(left_s)
            return None

    def _nothing_happened(self) -> bool:
        last = self._complete
        return (
            last is not None
            and (last.membership, last.repair_round) == (self._membership, self._repair_round)
            and not (self._is_draining() and self._left)
        )

    def _look_through(self, walk: _Walk) -> bool:
        """True when every node that was asked answered; False as well when the walk was given up."""
        placement = Placement(walk.membership.members, walk.membership.replicas)
        survey = Survey(self._node.node_id, placement, self._peers)
        room: dict[str, bool] = {}
        cursor = left = unclear = 0
        while True:
            began_s = time.monotonic()
            variants, cursor = self._node.list(cursor, _PAGE)
            findings = survey.page(variants)
            unclear += findings.unclear
            left += findings.lacking + findings.unclear
            took_s = time.monotonic() - began_s
            given = self._give(walk, findings.needs, room)
            if given is None:
                return False
            unclear += given.failed
            left -= len(findings.needs) - given.short
            with self._changed:
                self._checked += len(variants)
                if not cursor:
                    self._left = left
                    return not unclear
            # The node answers clients with the other half of the time.
            if not self._wait(walk, took_s):
                return False

    def _give(self, walk: _Walk, needs: Sequence[Need], room: dict[str, bool]) -> _Given | None:
        """None when the walk is given up."""
        wanting: dict[Member, list[StoredVariant]] = defaultdict(list)
        for need in needs:
            for owner in need.owners:
                wanting[owner].append(need.variant)
        short: set[int] = set()  # variants that an owner still lacks
        failed = 0
        for owner, variants in wanting.items():
            if walk.gentle and not self._has_room(owner, room):
                continue
            for burst in self._pace.bursts(variants):
                if not self._wait(walk, self._pace.wait_s(time.monotonic())):
                    return None
                outcomes = self._peers.push(owner, burst)
                self._count(burst, outcomes)
                failed += outcomes.count(Outcome.FAILED)
                short.update(
                    id(variant)
                    for variant, outcome in zip(burst, outcomes, strict=True)
                    if outcome in (Outcome.REFUSED, Outcome.FAILED)
                )
        return _Given(len(short), failed)

    def _has_room(self, owner: Member, room: dict[str, bool]) -> bool:
        """Asked once in a walk. A node that does not answer is for the next walk."""
        if owner.node_id not in room:
            try:
                room[owner.node_id] = self._peers.has_room(owner)
            except NodeUnavailableError:
                room[owner.node_id] = False
        return room[owner.node_id]

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
            return not self._changed.wait_for(lambda: self._stopped or self._is_old(walk), wait_s)

    def _is_old(self, walk: _Walk) -> bool:
        return self._stopped or walk.membership != self._membership

    def _is_draining(self) -> bool:
        members = self._membership.members if self._membership is not None else ()
        return any(member.node_id == self._node.node_id and member.draining for member in members)


def _names(membership: Membership | None) -> set[str]:
    return {member.node_id for member in membership.members} if membership is not None else set()
