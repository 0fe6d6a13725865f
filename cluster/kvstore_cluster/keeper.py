"""The thread that looks after a storage node: write-back, demotion, expiry, compaction."""

import logging
import threading

from kvstore_cluster.arena import Arena
from kvstore_cluster.node import StorageNode
from kvstore_codec.errors import StorageError

log = logging.getLogger(__name__)

PERIOD_S = 0.5


class Keeper:
    """Calls `StorageNode.maintain` from `start` until `stop`, and first has the memory ready that puts will need."""

    def __init__(self, node: StorageNode, arena: Arena, period_s: float = PERIOD_S) -> None:
        self._node = node
        self._arena = arena
        self._period_s = period_s
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="kvstore-keeper", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Waits for the round under way."""
        self._stopped.set()
        self._thread.join()

    def _run(self) -> None:
        populating = True
        while not self._stopped.is_set():
            try:
                populating = populating and self._arena.populate()
                if not self._node.maintain() and not populating:
                    self._node.wait_for_work(self._period_s)
            except StorageError as error:
                # What could not be moved stays where it is; the next round tries again.
                log.warning("looking after %s failed: %s", self._node.node_id, error)
                self._stopped.wait(self._period_s)
