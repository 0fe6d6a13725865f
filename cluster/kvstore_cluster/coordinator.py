"""Who is in the cluster and what its nodes shall keep: membership numbered by epochs, pins, quotas, draining nodes,
rounds of repair. No network, no Ray."""

import logging
import math
import secrets
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from kvstore_api.placement import Member, Membership
from kvstore_cluster.background import BackgroundLoop
from kvstore_cluster.catalogue import Catalogue, ClusterState, NodeRecord
from kvstore_codec.errors import CatalogueError, TooManyPinsError, TooManyQuotasError, UnknownNodeError
from kvstore_codec.identity import ChunkId

log = logging.getLogger(__name__)

MAX_PINS = 1 << 17
MAX_QUOTAS = 1 << 12
_RETRY_PERIOD_S = 0.5


@dataclass(frozen=True, slots=True)
class Directives:
    """What a storage node is told each time it reports. `version` numbers pins and quotas, which are None when the
    node has that version. `quotas` are the node's own shares, in bytes by tenant."""

    membership: Membership
    version: int
    pins: frozenset[ChunkId] | None
    quotas: dict[str, int] | None
    repair_round: int
    draining: bool
    """The node itself."""


class Coordinator:
    """Thread-safe. Every change of the membership raises the epoch by one.

    Membership is what is true now, so it changes at once and is written to the catalogue as soon as that can be had:
    while it cannot, the cluster goes on, and nobody waits for it. Pins, quotas, draining and repair are what somebody
    decided: they are in the catalogue before they count, and raise CatalogueError when it cannot keep them.
    """

    def __init__(self, catalogue: Catalogue, *, replicas: int = 1) -> None:
        self._catalogue = catalogue
        self._replicas = replicas
        self._lock = threading.Lock()  # guards the books, never held for long
        self._writing = threading.Lock()  # guards the catalogue, taken before the other one
        self._kept = catalogue.load()
        # Whoever was alive when the last coordinator stopped may not be now: not members until seen again.
        self._state = replace(
            self._kept,
            nodes=tuple(
                replace(node, alive=False, error="not seen since the coordinator started")
                if node.alive
                else node
                for node in self._kept.nodes
            ),
        )
        # Nodes may know versions of a coordinator that could not keep them.
        self._life = secrets.randbits(32)
        self._keeping: BackgroundLoop | None = None
        self._keep_failed = False
        self._closed = False

    def join(self, member: Member, incarnation: int) -> Membership:
        """A node says that it is up; nodes repeat it, which changes nothing. Another `incarnation` than the
        known one means that the node restarted, elsewhere. A smaller one comes too late and is ignored,
        unless the known one is dead: then the clock of the node's machine went back."""
        with self._lock:
            known = self._find(member.node_id)
            joins = (
                known is None
                or incarnation > known.incarnation
                or (incarnation != known.incarnation and not known.alive)
            )
            if joins:
                log.info("node %s joined at %s", member.node_id, member.endpoint)
                self._put(NodeRecord(member, incarnation, alive=True))
        if joins:
            self._keep()
        return self.membership()

    def leave(self, node_id: str, incarnation: int) -> None:
        """A node goes on purpose and is forgotten, though not that it was draining. Ignored for another incarnation
        than the known one."""
        with self._lock:
            known = self._find(node_id)
            if known is None or known.incarnation != incarnation:
                return
            log.info("node %s left", node_id)
            self._set_nodes([node for node in self._state.nodes if node is not known])
        self._keep()

    def mark_dead(self, node_id: str, incarnation: int, reason: str) -> None:
        """The node does not answer: no member until it joins anew or is marked alive. Ignored when it has
        restarted meanwhile. Does not wait for the catalogue: there are other nodes to watch."""
        with self._lock:
            known = self._find(node_id)
            if known is None or not known.alive or known.incarnation != incarnation:
                return
            log.warning("node %s at %s is dead: %s", node_id, known.member.endpoint, reason)
            self._put(replace(known, alive=False, error=reason))
        self._keep_soon()

    def mark_alive(self, node_id: str, incarnation: int) -> None:
        """The node answers again. Ignored when it has restarted meanwhile."""
        with self._lock:
            known = self._find(node_id)
            if known is None or known.alive or known.incarnation != incarnation:
                return
            log.info("node %s at %s is back", node_id, known.member.endpoint)
            self._put(replace(known, alive=True, error=""))
        self._keep_soon()

    def membership(self) -> Membership:
        """The live nodes, by node id."""
        with self._lock:
            return self._membership()

    def nodes(self) -> tuple[NodeRecord, ...]:
        """Every known node, dead ones too, by node id."""
        with self._lock:
            return tuple(replace(node, member=self._marked(node.member)) for node in self._state.nodes)

    def directives(self, node_id: str, known: int) -> Directives:
        """What `node_id` shall do. `known` is the version it has, 0 for none."""
        with self._lock:
            state, membership = self._state, self._membership()
            draining = node_id in state.draining
            # The shares depend on the membership.
            version = (self._life << 64) + state.epoch + state.changes + 1
            if known == version:
                return Directives(membership, version, None, None, state.repair_round, draining)
            quotas = {tenant: self._share(node_id, limit) for tenant, limit in state.quotas.items()}
            return Directives(membership, version, state.pins, quotas, state.repair_round, draining)

    def pin(self, chunks: Sequence[ChunkId]) -> int:
        """No node evicts these, wherever they are or come to be. Returns how many chunks are pinned now. Raises
        CatalogueError, TooManyPinsError; then none of them was pinned."""
        return self._set_pins(lambda pins: pins.union(chunks))

    def unpin(self, chunks: Sequence[ChunkId]) -> int:
        """Returns how many chunks are pinned now. Raises CatalogueError."""
        return self._set_pins(lambda pins: pins.difference(chunks))

    def pins(self) -> frozenset[ChunkId]:
        with self._lock:
            return self._state.pins

    def set_quota(self, tenant: str, limit_bytes: int) -> None:
        """Bytes that the tenant may keep in the whole cluster, replicas counted; 0: no limit. Raises CatalogueError,
        TooManyQuotasError."""

        def changed(state: ClusterState) -> ClusterState:
            others = {name: limit for name, limit in state.quotas.items() if name != tenant}
            quotas = others | ({tenant: limit_bytes} if limit_bytes else {})
            if quotas == state.quotas:
                return state
            if len(quotas) > max(MAX_QUOTAS, len(state.quotas)):
                raise TooManyQuotasError(
                    f"{MAX_QUOTAS} tenants have a quota, and no more can; take one away with 0 bytes first"
                )
            return replace(state, quotas=quotas, changes=state.changes + 1)

        self._decide(changed)

    def quotas(self) -> dict[str, int]:
        """Bytes in the whole cluster, by tenant."""
        with self._lock:
            return dict(self._state.quotas)

    def drain(self, node_id: str) -> None:
        """The node shall own nothing any more, also after a restart. Raises UnknownNodeError, CatalogueError."""
        with self._lock:
            if self._find(node_id) is None:
                names = ", ".join(node.member.node_id for node in self._state.nodes) or "none"
                raise UnknownNodeError(f"there is no node {node_id!r}; known are {names}")
        self._set_draining(lambda draining: draining | {node_id})

    def cancel_drain(self, node_id: str) -> None:
        """The node owns chunks again. Raises UnknownNodeError when it was not draining, CatalogueError."""
        with self._lock:
            if node_id not in self._state.draining:
                names = ", ".join(sorted(self._state.draining)) or "none"
                raise UnknownNodeError(f"node {node_id!r} is not draining; those that are: {names}")
        self._set_draining(lambda draining: draining - {node_id})

    def repair(self) -> int:
        """Begins a round in which every node looks what the other owners of its chunks lack, and returns its number.
        Raises CatalogueError."""
        return self._decide(lambda state: replace(state, repair_round=state.repair_round + 1)).repair_round

    def close(self) -> None:
        """Gives up what could not be written. The catalogue is left open."""
        with self._lock:
            self._closed = True
            keeping = self._keeping
        if keeping is not None:
            keeping.stop()

    def _set_pins(self, change: Callable[[frozenset[ChunkId]], frozenset[ChunkId]]) -> int:
        def changed(state: ClusterState) -> ClusterState:
            pins = change(state.pins)
            if pins == state.pins:
                return state
            if len(pins) > max(MAX_PINS, len(state.pins)):
                raise TooManyPinsError(
                    f"{len(pins)} chunks would be pinned, and at most {MAX_PINS} can be; unpin some first"
                )
            return replace(state, pins=pins, changes=state.changes + 1)

        return len(self._decide(changed).pins)

    def _set_draining(self, change: Callable[[frozenset[str]], frozenset[str]]) -> None:
        def changed(state: ClusterState) -> ClusterState:
            draining = change(state.draining)
            if draining == state.draining:
                return state
            return replace(state, draining=draining, epoch=state.epoch + 1)

        self._decide(changed)

    def _decide(self, change: Callable[[ClusterState], ClusterState]) -> ClusterState:
        """Writes what `change` makes of the state, which leaves the nodes alone, and then lets it count."""
        with self._writing:
            with self._lock:
                before = self._state
            wanted = change(before)
            if wanted is before:
                return before
            self._catalogue.save(wanted)
            with self._lock:
                self._kept = wanted
                # Nodes may have come or gone meanwhile.
                self._state = wanted if self._state is before else change(self._state)
                state = self._state
        self._keep()
        return state

    def _keep(self) -> None:
        """Writes the state, unless somebody tries that already. After a failure it is tried until it works."""
        with self._lock:
            if self._keeping is not None:
                return
        try:
            self._keep_now()
        except Exception:
            self._keep_soon()  # which says why, if that is still so

    def _keep_soon(self) -> None:
        """Has a thread write the state, which tries until that works."""
        with self._lock:
            if self._keeping is None and self._state is not self._kept and not self._closed:
                keeping = BackgroundLoop("kvstore-catalogue", lambda: self._try_to_keep(keeping))
                self._keeping, self._keep_failed = keeping, False
                keeping.start()

    def _keep_now(self) -> None:
        """Raises CatalogueError."""
        with self._writing:
            with self._lock:
                state = self._state
                if state is self._kept:
                    return
            self._catalogue.save(state)
            with self._lock:
                self._kept = state

    def _try_to_keep(self, keeping: BackgroundLoop) -> None:
        """A step of `keeping`, which ends when the state is written."""
        try:
            self._keep_now()
        except CatalogueError as error:
            if not self._keep_failed:
                log.warning("the membership is not kept, and will be once that is possible: %s", error)
            self._keep_failed = True
            keeping.stopping.wait(_RETRY_PERIOD_S)
            return
        with self._lock:
            if self._state is not self._kept:
                return
            self._keeping, failed = None, self._keep_failed
        keeping.stop()
        if failed:
            log.info("the membership is kept again")

    def _membership(self) -> Membership:
        alive = tuple(self._marked(node.member) for node in self._state.nodes if node.alive)
        return Membership(self._state.epoch, alive, self._replicas)

    def _marked(self, member: Member) -> Member:
        return replace(member, draining=True) if member.node_id in self._state.draining else member

    def _share(self, node_id: str, limit_bytes: int) -> int:
        """What is left of a quota for one node: as much as its weight is of the weights of all that own something."""
        weights = {
            node.member.node_id: node.member.weight
            for node in self._state.nodes
            if node.alive and node.member.node_id not in self._state.draining
        }
        node = self._find(node_id)
        own = node.member.weight if node is not None else 0.0
        weights[node_id] = own
        return math.ceil(limit_bytes * own / sum(weights.values())) if own else limit_bytes

    def _find(self, node_id: str) -> NodeRecord | None:
        return next((node for node in self._state.nodes if node.member.node_id == node_id), None)

    def _put(self, record: NodeRecord) -> None:
        others = [node for node in self._state.nodes if node.member.node_id != record.member.node_id]
        self._set_nodes([*others, record])

    def _set_nodes(self, nodes: list[NodeRecord]) -> None:
        ordered = tuple(sorted(nodes, key=lambda node: node.member.node_id))
        self._state = replace(self._state, epoch=self._state.epoch + 1, nodes=ordered)
