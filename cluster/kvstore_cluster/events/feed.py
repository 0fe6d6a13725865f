"""Sends a node's reports of changed blocks to the coordinator."""

from collections.abc import Callable

from kvstore_cluster.background import BackgroundLoop
from kvstore_cluster.events.base import NodeReport
from kvstore_cluster.events.changes import TierChanges

_GATHER_S = 0.02
"""Changes within this time share a report."""
_ALIVE_S = 1.0
"""An idle node sends an empty report this often, so that a coordinator that does not know its blocks can say so."""
_RETRY_S = 0.5
"""Pause after a report that the coordinator did not accept: this node may not be a member yet."""


class ReportFeed:
    """Calls `send` with each report, from `start` until `stop`. `send` returns whether the coordinator knows the
    node's earlier reports, and raises when a report may be lost; in both cases all blocks are reported again."""

    def __init__(
        self,
        node_id: str,
        incarnation: int,
        changes: TierChanges,
        send: Callable[[NodeReport], bool],
        *,
        gather_s: float = _GATHER_S,
        alive_s: float = _ALIVE_S,
        retry_s: float = _RETRY_S,
    ) -> None:
        self._node_id, self._incarnation, self._changes, self._send = node_id, incarnation, changes, send
        self._gather_s, self._alive_s, self._retry_s = gather_s, alive_s, retry_s
        self._number = 0
        self._more = False
        self._loop = BackgroundLoop("kvstore-events", self._step)
        changes.report_all()

    def start(self) -> None:
        self._loop.start()

    def stop(self) -> None:
        self._loop.stop()

    def _step(self) -> None:
        if not self._more and self._changes.wait(self._alive_s):
            self._loop.stopping.wait(self._gather_s)
        states, from_scratch, complete, self._more = self._changes.take()
        self._number += 1
        report = NodeReport(
            self._node_id,
            self._incarnation,
            self._number,
            states,
            from_scratch=from_scratch,
            complete=complete,
        )
        try:
            known = self._send(report)
        except Exception:
            self._changes.report_all()
            raise
        if not known:
            self._changes.report_all()
            self._loop.stopping.wait(self._retry_s)
