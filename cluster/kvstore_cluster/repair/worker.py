"""The thread of a storage node that keeps its chunks on all of their owners."""

import logging
import threading
import time
from dataclasses import dataclass

from kvstore_api.placement import Membership, Placement
from kvstore_cluster.coordinator import Directives
from kvstore_cluster.repair.base import Outcome, PeerNodes, Stock
from kvstore_cluster.repair.pace import Pace
from kvstore_cluster.repair.walk import Need, Survey
from kvstore_codec.errors import KVStoreError, NodeUnavailableError

log = logging.getLogger(__name__)

DEFAULT_PERIOD_S = 300.0
# Nodes that come or go seldom do so alone.
_SETTLE_S = 0.5
_RETRY_S = 5.0
_PAGE = 1024


@dataclass(frozen=True, slots=True)
class _Walk:
    """`gentle`: nothing has happened, so what a full node lacks it has evicted, and does not get again."""

    membership: Membership
    repair_round: int
    gentle: bool


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
                self._membership = directives.membership
                self._due_s = time.monotonic() + _SETTLE_S
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
                    again_s = self._period_s if complete and not self._is_draining() else _RETRY_S
                    self._due_s = time.monotonic() + min(again_s, self._period_s)

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
            for need in findings.needs:
                outcomes = self._send(walk, need, room)
                if outcomes is None:
                    return False
                unclear += Outcome.FAILED in outcomes
                left -= all(outcome in (Outcome.SENT, Outcome.NOT_NEEDED) for outcome in outcomes)
            with self._changed:
                self._checked += len(variants)
                if not cursor:
                    self._left = left
                    return not unclear
            # The node answers clients with the other half of the time.
            if not self._wait(walk, took_s):
                return False

    def _send(self, walk: _Walk, need: Need, room: dict[str, bool]) -> list[Outcome] | None:
        """One outcome for each owner that lacks the variant; None when the walk is given up."""
        outcomes: list[Outcome] = []
        for owner in need.owners:
            try:
                if walk.gentle and owner.node_id not in room:
                    room[owner.node_id] = self._peers.has_room(owner)
            except NodeUnavailableError:
                outcomes.append(Outcome.FAILED)
                continue
            if walk.gentle and not room[owner.node_id]:
                outcomes.append(Outcome.NOT_NEEDED)
                continue
            if not self._wait(walk, self._pace.wait_s(time.monotonic())):
                return None
            outcome = self._peers.push(owner, need.variant)
            self._count(outcome, need.variant.size_bytes)
            outcomes.append(outcome)
        return outcomes

    def _count(self, outcome: Outcome, size_bytes: int) -> None:
        if outcome is Outcome.SENT:
            self._pace.sent(size_bytes, time.monotonic())
        with self._changed:
            match outcome:
                case Outcome.SENT:
                    self._counters.repair_sent += 1
                    self._counters.repair_sent_bytes += size_bytes
                case Outcome.REFUSED:
                    self._counters.repair_refused += 1
                case Outcome.FAILED:
                    self._counters.repair_failed += 1
                case Outcome.NOT_NEEDED:
                    pass

    def _wait(self, walk: _Walk, wait_s: float) -> bool:
        """False as soon as the walk is to be given up."""
        with self._changed:
            return not self._changed.wait_for(lambda: self._stopped or self._is_old(walk), wait_s)

    def _is_old(self, walk: _Walk) -> bool:
        return self._stopped or walk.membership != self._membership

    def _is_draining(self) -> bool:
        members = self._membership.members if self._membership is not None else ()
        return any(member.node_id == self._node.node_id and member.draining for member in members)
