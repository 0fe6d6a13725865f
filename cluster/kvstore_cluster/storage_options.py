"""What a storage node is made of."""

from dataclasses import dataclass
from pathlib import Path

from kvstore_cluster.durability import Durability
from kvstore_cluster.eviction import DEFAULT_POLICY

DEFAULT_REPAIR_BANDWIDTH_BPS = 800e6


@dataclass(frozen=True, slots=True)
class StorageOptions:
    """`folder` is where its disk lives, if it has `disk_bytes`; `repair_bandwidth_bps` are bits a second; with
    `experiments` its disk can be made slow."""

    memory_bytes: int
    disk_bytes: int = 0
    folder: Path | None = None
    durability: Durability = Durability.RELAXED
    policy: str = DEFAULT_POLICY
    repair_bandwidth_bps: float = DEFAULT_REPAIR_BANDWIDTH_BPS
    experiments: bool = False
