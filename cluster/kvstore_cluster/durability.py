"""What an acknowledged put survives."""

from enum import IntEnum


class Durability(IntEnum):
    """Numbered as on the wire."""

    DEFAULT = 0
    """As the node is configured."""
    MEMORY = 1
    """Write-back: in memory now, on disk soon."""
    RELAXED = 2
    """Write-through: the death of the process. A node whose disk fails keeps the chunk in memory only."""
    DURABLE = 3
    """Write-through and synced: a power loss. Refused where that cannot be promised."""
