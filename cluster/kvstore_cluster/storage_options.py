"""The storage options of a node."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from kvstore_cluster.durability import Durability
from kvstore_cluster.encryption import KeySource
from kvstore_cluster.eviction import DEFAULT_POLICY

DEFAULT_REPAIR_BANDWIDTH_BPS = 800e6


@dataclass(frozen=True, slots=True)
class StorageOptions:
    """Storage options of a node. `folder` contains the disk tier, which exists when `disk_bytes` is above 0.
    `repair_bandwidth_bps` is in bits per second. `experiments` allows limits on the speed of the disk. An `isolated`
    node keeps tenants apart. With `events` it reports which chunks enter and leave its tiers. With `keys`, which opens
    the key file in the node's process, it encrypts what it writes to disk."""

    memory_bytes: int
    disk_bytes: int = 0
    folder: Path | None = None
    durability: Durability = Durability.RELAXED
    policy: str = DEFAULT_POLICY
    repair_bandwidth_bps: float = DEFAULT_REPAIR_BANDWIDTH_BPS
    experiments: bool = False
    isolated: bool = False
    events: bool = False
    keys: Callable[[], KeySource] | None = None
