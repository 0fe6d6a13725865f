"""Interfaces through which repair uses its own node and the other nodes."""

from collections.abc import Sequence
from enum import Enum, auto
from typing import Protocol

from kvstore_api.placement import Member
from kvstore_cluster.stored import StoredVariant


class Outcome(Enum):
    """Result of sending a copy."""

    SENT = auto()
    NOT_NEEDED = auto()
    """The other node has the variant, or this node no longer has it."""
    REFUSED = auto()
    """The other node or the tenant's quota is full. A retry would soon fail again."""
    FAILED = auto()


class LocalInventory(Protocol):
    """The chunks of the local node. StorageNode implements it."""

    node_id: str

    def list(self, cursor: int, limit: int) -> tuple[Sequence[StoredVariant], int]:
        """A page of stored variants, and the cursor of the next page, 0 after the last one."""


class PeerNodes(Protocol):
    """The other storage nodes. Used by one thread, except `close`, which any thread may call. Methods may block."""

    def lookup(self, member: Member, variants: Sequence[StoredVariant]) -> list[bool]:
        """For each of these variants, all in one encoding, whether `member` has it, with any calibration. Does not
        count as a use. Raises NodeUnavailableError."""

    def room_bytes(self, member: Member) -> int:
        """Bytes that `member` can store without evicting. Raises NodeUnavailableError."""

    def push(self, member: Member, variants: Sequence[StoredVariant]) -> list[Outcome]:
        """Sends copies to `member`, and returns one outcome for each. Does not count as a use. Never raises."""

    def close(self) -> None:
        """Aborts running calls. Later calls fail."""
