"""The durable state of the coordinator, and the interface of a catalogue that stores it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from kvstore_api.placement import Member
from kvstore_cluster.forgotten import Forgotten
from kvstore_codec.identity import ChunkId


@dataclass(frozen=True, slots=True)
class NodeRecord:
    """A known storage node. `incarnation` increases with every restart of the node. `error` says why a node is not
    alive."""

    member: Member
    incarnation: int
    alive: bool
    error: str = ""


@dataclass(frozen=True, slots=True)
class ClusterState:
    epoch: int = 0
    nodes: tuple[NodeRecord, ...] = ()
    pins: Mapping[str, frozenset[ChunkId]] = field(default_factory=dict)
    """Chunks that no node may evict, by tenant. On nodes that do not keep tenants apart, pins of the default tenant
    apply to the chunks of all."""
    quotas: dict[str, int] = field(default_factory=dict)
    """Quotas in the whole cluster, in bytes by tenant."""
    draining: frozenset[str] = frozenset()
    """Ids of nodes that must not own chunks, including nodes that are not in the cluster."""
    repair_round: int = 0
    changes: int = 0
    """Number of changes of pins and quotas."""
    forgotten: Forgotten = field(default_factory=Forgotten)
    """Tenants whose chunks every node must remove, also one that is away now."""


class Catalogue(Protocol):
    """Stores a ClusterState for one coordinator at a time. Used by one thread at a time. Methods may block."""

    def load(self) -> ClusterState:
        """The last saved state, or an empty one when none was saved. Raises CatalogueError."""

    def save(self, state: ClusterState) -> None:
        """Saves the state durably. Raises CatalogueError, and then keeps the old state."""

    def close(self) -> None:
        """Releases the catalogue for another coordinator."""
