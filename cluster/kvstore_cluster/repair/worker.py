"""The repair thread of a storage node, which copies its chunks to owners that lack them."""

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
# Delays before a walk after a node joined or was lost. Nodes often join together, and most lost nodes return with their
# disks.
_SETTLE_S = 0.5
_SETTLE_LOST_S = 3.0
_RETRY_S = 5.0
_DRAIN_PERIOD_S = 1.0
# Clients may put chunks by the previous membership for this long after a change.
_LATE_PUTS_S = 10.0
_PAGE = 1024


@dataclass(frozen=True, slots=True)
class _Walk:
    """One pass over all variants of the node. A `gentle` walk sends only what the other node has room for without
    evicting. A periodic walk is gentle, because a full node would evict the same chunks again. The walk of a draining
    node is gentle, because its copies must stay where they are sent."""

    membership: Membership
    repair_round: int
    draining: bool
    gentle: bool


@dataclass(frozen=True, slots=True)
class _Given:
    """Counts of variants that an owner still lacks (`short`), of those that it refused or has no room for (`denied`),
    and of failed copies (`failed`)."""

    short: int
    denied: int
    failed: int


@dataclass(slots=True)
class RepairCounters:
    """Counters that only increase. A refused copy met a full node or quota. A failed copy is retried."""

    repair_sent: int = 0
    repair_sent_bytes: int = 0
    repair_refused: int = 0
    repair_failed: int = 0


class RepairWorker:
    """Walks through all variants of `node`, asks the other owners which they lack, and sends copies, at most
    `bytes_per_s` on average. It walks after a change of the membership, in every repair round, and every `period_s`. A
    draining node walks continuously. A change of the membership aborts the walk and starts a new one, which skips the
    copies that were already sent.

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
        self._due_s = 0.0  # monotonic time of the next walk
        self._walk: _Walk | None = None  # the running walk
        self._finished: _Walk | None = None  # the last walk that was not aborted
        self._complete: _Walk | None = None  # the last walk in which every node answered
        self._checked = 0
        self._left = 0  # variants that an owner lacked after the last walk, or before it while draining
        self._stuck = 0  # those of them that no node accepted
        self._counters = RepairCounters()
        self._loop = BackgroundLoop("kvstore-repair", self._walk_when_due, wake=self._interrupt)

    def start(self) -> None:
        self._loop.start()

    def stop(self) -> None:
        """Stops the thread, and aborts a running copy."""
        self._loop.stop()

    def update(self, directives: Directives) -> None:
        """Applies the coordinator's directives. Called about once a second."""
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
        """The gauges of repair. `chunks` is the number of variants on the node. `repair_round` and `repair_epoch`
        belong to the last walk in which every other node answered. A draining node has `draining` 1. `drain_left` is
        the number of its variants that an owner lacked in the last walk: at 0 the node can be shut down. `drain_stuck`
        of them are accepted by no other node."""
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
            log.warning("repair failed and will be retried: %s", error)
        finally:
            with self._changed:
                self._walk = None
                if not self._is_old(walk):
                    if complete:
                        self._complete = walk
                    if self._repair_round == walk.repair_round:
                        self._due_s = time.monotonic() + self._pause_s(walk, complete=complete)

    def _pause_s(self, walk: _Walk, *, complete: bool) -> float:
        """Seconds until the next walk."""
        if self._is_draining():
            return _DRAIN_PERIOD_S
        if not complete:
            return min(_RETRY_S, self._period_s)
        return self._period_s if walk.gentle else min(_LATE_PUTS_S, self._period_s)

    def _next(self) -> _Walk | None:
        """Waits until a walk is due, and returns it. None after `stop`."""
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
        """Runs a walk. True when every asked node answered. False otherwise, and when the walk was aborted."""
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
            if not walk.draining:  # while draining, the next walk checks that the copies are still there
                left -= len(findings.needs) - given.short
            with self._changed:
                self._checked += len(variants)
                if not cursor:
                    self._finished, self._left, self._stuck = walk, left, stuck
                    return not unclear
            # Pause as long as the survey took, to leave half of the time for clients.
            if not self._wait(walk, took_s):
                return False

    def _give(self, walk: _Walk, needs: Sequence[Need]) -> _Given | None:
        """Sends the needed copies. None when the walk was aborted."""
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
        """How many of the variants, from the first on, the owner has room for. All when the owner does not answer;
        sending them then fails."""
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
        """Waits for `wait_s`. Returns False as soon as the walk must be aborted."""
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
