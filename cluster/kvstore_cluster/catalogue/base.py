"""What the coordinator must not forget, and the contract of the places that keep it."""

from dataclasses import dataclass, field
from typing import Protocol

from kvstore_api.placement import Member
from kvstore_codec.identity import ChunkId


@dataclass(frozen=True, slots=True)
class NodeRecord:
    """A storage node the cluster knows. `incarnation` grows with every restart of the node; `error` says why a
    node that is not alive is not."""

    member: Member
    incarnation: int
    alive: bool
    error: str = ""


@dataclass(frozen=True, slots=True)
class ClusterState:
    epoch: int = 0
    nodes: tuple[NodeRecord, ...] = ()
    pins: frozenset[ChunkId] = frozenset()
    """Chunks that no node may evict."""
    quotas: dict[str, int] = field(default_factory=dict)
    """Bytes in the whole cluster, by tenant."""
    draining: frozenset[str] = frozenset()
    """Ids of nodes that shall own nothing, whether they are there or not."""
    repair_round: int = 0
    changes: int = 0
    """How often pins or quotas changed."""


class Catalogue(Protocol):
    """Keeps a ClusterState for one coordinator at a time. Used by one thread at a time."""

    def load(self) -> ClusterState:
        """The state last saved; an empty one when there never was any. Raises CatalogueError."""

    def save(self, state: ClusterState) -> None:
        """Returns once the state is kept. Raises CatalogueError; the old state then stays."""

    def close(self) -> None:
        """Lets another coordinator have it."""
