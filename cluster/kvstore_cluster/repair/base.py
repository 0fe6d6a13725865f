"""What repair needs of its own node and of the others."""

from collections.abc import Sequence
from enum import Enum, auto
from typing import Protocol

from kvstore_api.placement import Member
from kvstore_cluster.stored import StoredVariant
from kvstore_codec.identity import ChunkId


class Outcome(Enum):
    """What became of a copy."""

    SENT = auto()
    NOT_NEEDED = auto()
    """The other node has it, or this one has it no more."""
    REFUSED = auto()
    """The other node will not take it: it is full, or the tenant's quota is. Nothing that a retry would change soon."""
    FAILED = auto()


class LocalInventory(Protocol):
    """A node's own chunks, as StorageNode has them."""

    node_id: str

    def list(self, cursor: int, limit: int) -> tuple[Sequence[StoredVariant], int]:
        """A page of what is stored and the cursor of the next one, 0 after the last."""


class PeerNodes(Protocol):
    """The other storage nodes. Used by one thread, `close` by any."""

    def lookup(self, member: Member, chunks: Sequence[ChunkId], encoding: str) -> list[bool]:
        """For each chunk whether `member` has it in `encoding`, coded with whatever calibration; that is no use of
        it. Raises NodeUnavailableError."""

    def room_bytes(self, member: Member) -> int:
        """How much `member` could take without evicting. Raises NodeUnavailableError."""

    def push(self, member: Member, variants: Sequence[StoredVariant]) -> list[Outcome]:
        """Sends copies, which is no use of the variants either; one outcome for each. Never raises."""

    def close(self) -> None:
        """Ends what is under way; calls fail from then on."""
