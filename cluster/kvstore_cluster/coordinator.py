"""The coordinator: membership with epochs, pins, quotas, draining nodes and repair rounds of a cluster. Uses no network
and no Ray."""

import logging
import math
import secrets
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from kvstore_api.placement import Member, Membership
from kvstore_cluster.background import BackgroundLoop
from kvstore_cluster.catalogue import Catalogue, ClusterState, NodeRecord
from kvstore_cluster.forgettings import AppliedForgettings, ForgettingRate
from kvstore_cluster.forgotten import Forgotten
from kvstore_codec.errors import CatalogueError, TooManyPinsError, TooManyQuotasError, UnknownNodeError
from kvstore_codec.identity import ChunkId

log = logging.getLogger(__name__)

MAX_PINS = 1 << 17
"""Most pinned chunks of all tenants, besides the first RESERVED_PINS of each."""
MAX_PINS_OF_TENANT = 1 << 14
"""Most pinned chunks of one tenant, where tenants are kept apart: 4 million tokens of 256 a chunk."""
RESERVED_PINS = 128
"""Chunks that each tenant can pin whatever others have pinned."""
MAX_PINNING_TENANTS = 1 << 10
MAX_QUOTAS = 1 << 12
_RETRY_PERIOD_S = 0.5


@dataclass(frozen=True, slots=True)
class Directives:
    """The coordinator's answer to a report of a storage node. `version` is the version of pins and quotas, which are
    None when the node already has that version. `quotas` are this node's shares, in bytes by tenant."""

    membership: Membership
    version: int
    pins: Mapping[str, frozenset[ChunkId]] | None
    quotas: dict[str, int] | None
    repair_round: int
    draining: bool
    """Whether this node is draining."""
    forgotten: Forgotten | None = None
    """Tenants whose chunks the node must remove; None when it has applied all."""


class Coordinator:
    """The state of a cluster. Thread-safe. Every change of the membership increments the epoch.

    The membership changes at once, and is written to the catalogue as soon as the catalogue is available. Until then
    the cluster continues without waiting. Pins, quotas, draining and repair rounds are decisions of operators: they are
    written to the catalogue before they take effect, and raise CatalogueError when that fails.
    """

    def __init__(self, catalogue: Catalogue, *, replicas: int = 1, isolated: bool = False) -> None:
        """`isolated` limits the pins of each tenant, as on nodes that keep tenants apart."""
        self._max_pins_of_tenant = MAX_PINS_OF_TENANT if isolated else MAX_PINS
        self._catalogue = catalogue
        self._replicas = replicas
        self._lock = threading.Lock()  # guards the state; never held during I/O
        self._writing = threading.Lock()  # guards the catalogue; acquired before `_lock`
        self._kept = catalogue.load()
        # Nodes that were alive when the last coordinator stopped may be dead now. They are no members until they join.
        self._state = replace(
            self._kept,
            nodes=tuple(
                replace(node, alive=False, error="not seen since the coordinator started")
                if node.alive
                else node
                for node in self._kept.nodes
            ),
        )
        # Makes versions unique to this process: a node may know one that an earlier coordinator could not save.
        self._life = secrets.randbits(32)
        self._applied, self._forgetting_rate = AppliedForgettings(), ForgettingRate()
        self._keeping: BackgroundLoop | None = None
        self._keep_failed = False
        self._closed = False

    def join(self, member: Member, incarnation: int) -> Membership:
        """Adds a node to the membership. Nodes call it repeatedly; a repeated call changes nothing. A larger
        `incarnation` than the known one means that the node restarted. A smaller one is outdated and ignored, unless
        the known incarnation is dead: then the clock of the node's machine was set back."""
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

    def register(self, member: Member, incarnation: int, known: int, applied: int) -> Directives:
        """Adds a node as `join` does, and returns its directives. `known` is as in `directives`. `applied` is the
        newest forgetting of a tenant that the node has applied. A node is not added before it has applied those that
        there were when it first registered, so that nobody reads from it, or is sent by it, what must be removed; it
        applies them and registers again."""
        with self._lock:
            forgotten = self._state.forgotten.since(applied)
            self._applied.note(member.node_id, applied)
            joins = self._applied.may_join(member.node_id, incarnation, self._state.forgotten.newest)
        if joins:
            self.join(member, incarnation)
        return replace(self.directives(member.node_id, known), forgotten=forgotten)

    def leave(self, node_id: str, incarnation: int) -> None:
        """Removes a node that shuts down. Keeps its draining flag. Ignored for another incarnation than the known
        one."""
        with self._lock:
            known = self._find(node_id)
            if known is None or known.incarnation != incarnation:
                return
            log.info("node %s left", node_id)
            self._set_nodes([node for node in self._state.nodes if node is not known])
            self._applied.left(node_id)
        self._keep()

    def mark_dead(self, node_id: str, incarnation: int, reason: str) -> None:
        """Removes an unresponsive node from the membership until it joins again or is marked alive. Ignored for another
        incarnation than the known one. Does not wait for the catalogue, because the caller watches other nodes, too."""
        with self._lock:
            known = self._find(node_id)
            if known is None or not known.alive or known.incarnation != incarnation:
                return
            log.warning("node %s at %s is dead: %s", node_id, known.member.endpoint, reason)
            self._put(replace(known, alive=False, error=reason))
            self._applied.died(node_id)
        self._keep_soon()

    def mark_alive(self, node_id: str, incarnation: int) -> None:
        """Returns a node that responds again to the membership. Ignored for another incarnation than the known one, and
        for a node that has not applied the forgettings of tenants that there were when it first responded again."""
        with self._lock:
            known = self._find(node_id)
            if known is None or known.alive or known.incarnation != incarnation:
                return
            if not self._applied.may_join(node_id, incarnation, self._state.forgotten.newest):
                return
            log.info("node %s at %s is back", node_id, known.member.endpoint)
            self._put(replace(known, alive=True, error=""))
        self._keep_soon()

    def membership(self) -> Membership:
        """The membership: the live nodes, sorted by node id."""
        with self._lock:
            return self._membership()

    def nodes(self) -> tuple[NodeRecord, ...]:
        """Every known node, including dead ones, sorted by node id."""
        with self._lock:
            return tuple(replace(node, member=self._marked(node.member)) for node in self._state.nodes)

    def live(self) -> set[tuple[str, int]]:
        """Node id and incarnation of each live node."""
        with self._lock:
            return {(node.member.node_id, node.incarnation) for node in self._state.nodes if node.alive}

    def directives(self, node_id: str, known: int) -> Directives:
        """The directives for a node. `known` is the version that the node has, 0 for none."""
        with self._lock:
            state, membership = self._state, self._membership()
            draining = node_id in state.draining
            # The shares depend on the membership.
            version = (self._life << 64) + state.epoch + state.changes + 1
            if known == version:
                return Directives(membership, version, None, None, state.repair_round, draining)
            quotas = {tenant: self._share(node_id, limit) for tenant, limit in state.quotas.items()}
            return Directives(membership, version, state.pins, quotas, state.repair_round, draining)

    def pin(self, chunks: Sequence[ChunkId], tenant: str = "") -> int:
        """Pins chunks of a tenant on all nodes, so that they are never evicted. Returns the number of the tenant's
        pinned chunks. Raises CatalogueError and TooManyPinsError; then no chunk is pinned."""
        return self._set_pins(tenant, lambda pins: pins.union(chunks))

    def unpin(self, chunks: Sequence[ChunkId], tenant: str = "") -> int:
        """Unpins chunks of a tenant. Returns the number of the tenant's pinned chunks. Raises CatalogueError."""
        return self._set_pins(tenant, lambda pins: pins.difference(chunks))

    def pins(self, tenant: str = "") -> frozenset[ChunkId]:
        with self._lock:
            return self._state.pins.get(tenant, frozenset())

    def set_quota(self, tenant: str, limit_bytes: int) -> None:
        """Limits the bytes that a tenant may store in the whole cluster, including replicas. 0 removes the limit.
        Raises CatalogueError, TooManyQuotasError."""

        def changed(state: ClusterState) -> ClusterState:
            others = {name: limit for name, limit in state.quotas.items() if name != tenant}
            quotas = others | ({tenant: limit_bytes} if limit_bytes else {})
            if quotas == state.quotas:
                return state
            if len(quotas) > max(MAX_QUOTAS, len(state.quotas)):
                raise TooManyQuotasError(
                    f"at most {MAX_QUOTAS} tenants can have a quota; remove one by setting it to 0 bytes"
                )
            return replace(state, quotas=quotas, changes=state.changes + 1)

        self._decide(changed)

    def quotas(self) -> dict[str, int]:
        """Quotas in the whole cluster, in bytes by tenant."""
        with self._lock:
            return dict(self._state.quotas)

    def forget(self, tenant: str, *, with_pins: bool) -> int:
        """Lets every node remove all chunks of a tenant, also one that is away now, once it returns. Removes the
        tenant's pins, too, if `with_pins` is set; its quota stays. Returns the generation of this forgetting, which
        `not_applied` takes. Raises CatalogueError and TooManyForgettingsError."""
        with self._lock:
            self._forgetting_rate.count(tenant)
            applied = self._applied.newest

        def changed(state: ClusterState) -> ClusterState:
            # After all that nodes have applied, also where the catalogue was lost and they have not registered yet.
            generation = max(state.forgotten.newest + 1, applied + 1, time.time_ns() // 1_000_000)
            forgotten = state.forgotten.merged(Forgotten({tenant: generation}))
            pins = {name: kept for name, kept in state.pins.items() if not with_pins or name != tenant}
            return replace(state, forgotten=forgotten, pins=pins, changes=state.changes + 1)

        return self._decide(changed).forgotten.newest

    def not_applied(self, generation: int) -> list[str]:
        """Ids of known nodes, including dead ones and those that are about to join, that have not removed the chunks of
        tenants that were forgotten up to `generation`."""
        with self._lock:
            return self._applied.missing((node.member.node_id for node in self._state.nodes), generation)

    def drain(self, node_id: str) -> None:
        """Starts draining a node: it no longer owns chunks, even after a restart. Raises UnknownNodeError,
        CatalogueError."""
        with self._lock:
            if self._find(node_id) is None:
                names = ", ".join(node.member.node_id for node in self._state.nodes) or "none"
                raise UnknownNodeError(f"there is no node {node_id!r}; known are {names}")
        self._set_draining(lambda draining: draining | {node_id})

    def cancel_drain(self, node_id: str) -> None:
        """Lets a draining node own chunks again. Raises UnknownNodeError when it is not draining, and
        CatalogueError."""
        with self._lock:
            if node_id not in self._state.draining:
                names = ", ".join(sorted(self._state.draining)) or "none"
                raise UnknownNodeError(f"node {node_id!r} is not draining; those that are: {names}")
        self._set_draining(lambda draining: draining - {node_id})

    def repair(self) -> int:
        """Begins a repair round, in which every node copies its chunks to owners that lack them. Returns the number of
        the round. Raises CatalogueError."""
        return self._decide(lambda state: replace(state, repair_round=state.repair_round + 1)).repair_round

    def close(self) -> None:
        """Stops saving the state. Does not close the catalogue."""
        with self._lock:
            self._closed = True
            keeping = self._keeping
        if keeping is not None:
            keeping.stop()

    def _set_pins(self, tenant: str, change: Callable[[frozenset[ChunkId]], frozenset[ChunkId]]) -> int:
        def changed(state: ClusterState) -> ClusterState:
            old = state.pins.get(tenant, frozenset())
            pins = change(old)
            if pins == old:
                return state
            others = {name: kept for name, kept in state.pins.items() if name != tenant}
            if len(pins) > len(old):
                self._require_pins(others.values(), pins)
            every = others | ({tenant: pins} if pins else {})
            return replace(state, pins=every, changes=state.changes + 1)

        return len(self._decide(changed).pins.get(tenant, ()))

    def _require_pins(self, others: Collection[frozenset[ChunkId]], pins: frozenset[ChunkId]) -> None:
        """Raises TooManyPinsError unless a tenant may have these pins beside those of the others."""
        if len(pins) > self._max_pins_of_tenant:
            raise TooManyPinsError(
                f"at most {self._max_pins_of_tenant} chunks can be pinned, and these would be {len(pins)}; "
                "unpin some first"
            )
        shared = sum(max(0, len(some) - RESERVED_PINS) for some in (*others, pins))
        full = shared > MAX_PINS and len(pins) > RESERVED_PINS
        if full or len(others) >= MAX_PINNING_TENANTS:
            raise TooManyPinsError(
                "the cluster has as many pinned chunks as it can keep; ask its operator to unpin some"
            )

    def _set_draining(self, change: Callable[[frozenset[str]], frozenset[str]]) -> None:
        def changed(state: ClusterState) -> ClusterState:
            draining = change(state.draining)
            if draining == state.draining:
                return state
            return replace(state, draining=draining, epoch=state.epoch + 1)

        self._decide(changed)

    def _decide(self, change: Callable[[ClusterState], ClusterState]) -> ClusterState:
        """Saves the state that `change` returns, and then puts it into effect. `change` must not change the nodes.
        Raises CatalogueError."""
        with self._writing:
            with self._lock:
                before = self._state
            wanted = change(before)
            if wanted is before:
                return before
            self._catalogue.save(wanted)
            with self._lock:
                self._kept = wanted
                if self._state is before:
                    self._state = wanted
                else:  # nodes have joined or left in the meantime
                    epoch = self._state.epoch + wanted.epoch - before.epoch
                    self._state = replace(wanted, nodes=self._state.nodes, epoch=epoch)
                state = self._state
        self._keep()
        return state

    def _keep(self) -> None:
        """Saves the state, unless a background thread is doing so. A failed save is retried in the background."""
        with self._lock:
            if self._keeping is not None:
                return
        try:
            self._keep_now()
        except Exception:
            self._keep_soon()  # logs the error if it persists

    def _keep_soon(self) -> None:
        """Starts a thread that saves the state and retries until it succeeds."""
        with self._lock:
            if self._keeping is None and self._state is not self._kept and not self._closed:
                keeping = BackgroundLoop("kvstore-catalogue", lambda: self._try_to_keep(keeping))
                self._keeping, self._keep_failed = keeping, False
                keeping.start()

    def _keep_now(self) -> None:
        """Saves the current state, unless it is saved. Raises CatalogueError."""
        with self._writing:
            with self._lock:
                state = self._state
                if state is self._kept:
                    return
            self._catalogue.save(state)
            with self._lock:
                self._kept = state

    def _try_to_keep(self, keeping: BackgroundLoop) -> None:
        """One attempt of the `keeping` thread to save the state. Stops the thread after success."""
        try:
            self._keep_now()
        except CatalogueError as error:
            if not self._keep_failed:
                log.warning("cannot save the membership, retrying: %s", error)
            self._keep_failed = True
            keeping.stopping.wait(_RETRY_PERIOD_S)
            return
        with self._lock:
            if self._state is not self._kept:
                return
            self._keeping, failed = None, self._keep_failed
        keeping.stop()
        if failed:
            log.info("the membership is saved again")

    def _membership(self) -> Membership:
        alive = tuple(self._marked(node.member) for node in self._state.nodes if node.alive)
        return Membership(self._state.epoch, alive, self._replicas)

    def _marked(self, member: Member) -> Member:
        return replace(member, draining=True) if member.node_id in self._state.draining else member

    def _share(self, node_id: str, limit_bytes: int) -> int:
        """A node's share of a quota, bytes: proportional to its weight among all nodes that own chunks."""
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
