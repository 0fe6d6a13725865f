"""The maintenance thread of a storage node: write-back, demotion, expiry and compaction."""

from kvstore_cluster.arena import Arena
from kvstore_cluster.background import BackgroundLoop
from kvstore_cluster.node import StorageNode

PERIOD_S = 0.5


class MaintenanceThread:
    """Calls `StorageNode.maintain` from `start` until `stop`, and populates the pages of the arena at the beginning."""

    def __init__(self, node: StorageNode, arena: Arena, period_s: float = PERIOD_S) -> None:
        self._node = node
        self._arena = arena
        self._period_s = period_s
        self._populating = True
        # A chunk that could not be moved stays in its tier until the next round.
        self._loop = BackgroundLoop("kvstore-maintenance", self._look_after, longest_pause_s=period_s)

    def start(self) -> None:
        self._loop.start()

    def stop(self) -> None:
        """Ends the loop, and waits for the current round."""
        self._loop.stop()

    def _look_after(self) -> None:
        worked = self._node.maintain()
        self._populating = self._populating and self._arena.populate()
        if not worked and not self._populating:
            self._node.wait_for_work(self._period_s)
