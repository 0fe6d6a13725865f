"""Who is in the cluster: membership numbered by epochs. No network, no Ray."""

import logging
import threading
from dataclasses import replace
from typing import Protocol

from kvstore_api.placement import Member, Membership
from kvstore_cluster.catalogue import ClusterState, NodeRecord

log = logging.getLogger(__name__)


class Catalogue(Protocol):
    """Where the coordinator keeps what must outlive it. Both methods raise CatalogueError."""

    def load(self) -> ClusterState: ...
    def save(self, state: ClusterState) -> None: ...


class Coordinator:
    """Thread-safe. Every change is in the catalogue before anybody sees it, and raises the epoch by one.

    Methods that change something raise CatalogueError when it cannot be kept; then nothing changed.
    """

    def __init__(self, catalogue: Catalogue) -> None:
        self._catalogue = catalogue
        self._lock = threading.Lock()
        self._state = catalogue.load()
        # Whoever was alive when the last coordinator stopped may not be now: not members until seen again.
        self._state = replace(
            self._state,
            nodes=tuple(
                replace(node, alive=False, error="not seen since the coordinator started")
                if node.alive
                else node
                for node in self._state.nodes
            ),
        )

    def join(self, member: Member, incarnation: int) -> Membership:
        """A node says that it is up; nodes repeat it, which changes nothing. Another `incarnation` than the
        known one means that the node restarted, empty and elsewhere. A smaller one comes too late and is ignored,
        unless the known one is dead: then the clock of the node's machine went back."""
        with self._lock:
            known = self._find(member.node_id)
            if (
                known is None
                or incarnation > known.incarnation
                or (incarnation != known.incarnation and not known.alive)
            ):
                log.info("node %s joined at %s", member.node_id, member.endpoint)
                self._put(NodeRecord(member, incarnation, alive=True))
            return self._membership()

    def leave(self, node_id: str, incarnation: int) -> None:
        """A node goes on purpose and is forgotten. Ignored for another incarnation than the known one."""
        with self._lock:
            known = self._find(node_id)
            if known is not None and known.incarnation == incarnation:
                log.info("node %s left", node_id)
                self._save([node for node in self._state.nodes if node is not known])

    def mark_dead(self, node_id: str, incarnation: int, reason: str) -> None:
        """The node does not answer: no member until it joins anew or is marked alive. Ignored when it has
        restarted meanwhile."""
        with self._lock:
            known = self._find(node_id)
            if known is not None and known.alive and known.incarnation == incarnation:
                log.warning("node %s at %s is dead: %s", node_id, known.member.endpoint, reason)
                self._put(replace(known, alive=False, error=reason))

    def mark_alive(self, node_id: str, incarnation: int) -> None:
        """The node answers again. Ignored when it has restarted meanwhile."""
        with self._lock:
            known = self._find(node_id)
            if known is not None and not known.alive and known.incarnation == incarnation:
                log.info("node %s at %s is back", node_id, known.member.endpoint)
                self._put(replace(known, alive=True, error=""))

    def membership(self) -> Membership:
        """The live nodes, by node id."""
        with self._lock:
            return self._membership()

    def nodes(self) -> tuple[NodeRecord, ...]:
        """Every known node, dead ones too, by node id."""
        with self._lock:
            return self._state.nodes

    def _membership(self) -> Membership:
        return Membership(self._state.epoch, tuple(node.member for node in self._state.nodes if node.alive))

    def _find(self, node_id: str) -> NodeRecord | None:
        return next((node for node in self._state.nodes if node.member.node_id == node_id), None)

    def _put(self, record: NodeRecord) -> None:
        others = [node for node in self._state.nodes if node.member.node_id != record.member.node_id]
        self._save([*others, record])

    def _save(self, nodes: list[NodeRecord]) -> None:
        ordered = tuple(sorted(nodes, key=lambda node: node.member.node_id))
        state = ClusterState(self._state.epoch + 1, ordered)
        self._catalogue.save(state)
        self._state = state
