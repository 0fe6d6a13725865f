"""Detects storage nodes that stop responding, and those that respond again."""

from collections import Counter
from collections.abc import Callable, Sequence

from kvstore_api.placement import Member
from kvstore_cluster.background import BackgroundLoop
from kvstore_cluster.catalogue import NodeRecord
from kvstore_cluster.coordinator import Coordinator

DEFAULT_PERIOD_S = 0.4
# A busy machine may miss one probe. The second missed probe in a row marks a node as dead.
MISSES_UNTIL_DEAD = 2


class FailureDetector:
    """Probes every known node at its data endpoint, which clients use, and reports the results to the coordinator.

    `probe` probes all given nodes concurrently. It returns None for each node that responded under its own name, and
    the reason for each of the others. It must return within about a second.
    """

    def __init__(
        self,
        coordinator: Coordinator,
        probe: Callable[[Sequence[Member]], Sequence[str | None]],
        period_s: float = DEFAULT_PERIOD_S,
    ) -> None:
        self._coordinator = coordinator
        self._probe = probe
        self._misses: Counter[tuple[str, int]] = Counter()
        self._loop = BackgroundLoop("kvstore-failure-detector", self.check, period_s=period_s)

    def start(self) -> None:
        self._loop.start()

    def stop(self) -> None:
        """Ends the loop, and waits for the current probe."""
        self._loop.stop()

    def check(self) -> None:
        """Probes every known node once."""
        nodes = self._coordinator.nodes()
        reasons = self._probe([node.member for node in nodes])
        for node, reason in zip(nodes, reasons, strict=True):
            self._judge(node, reason)
        known = {(node.member.node_id, node.incarnation) for node in nodes}
        for forgotten in self._misses.keys() - known:
            del self._misses[forgotten]

    def _judge(self, node: NodeRecord, reason: str | None) -> None:
        key = (node.member.node_id, node.incarnation)
        if reason is None:
            self._misses[key] = 0
            self._coordinator.mark_alive(*key)
            return
        self._misses[key] += 1
        if self._misses[key] >= MISSES_UNTIL_DEAD:
            self._coordinator.mark_dead(*key, reason)
