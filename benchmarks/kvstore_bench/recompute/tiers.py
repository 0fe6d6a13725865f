"""Where the documents are when they are asked for."""

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from kvstore_codec.errors import ConfigurationError, StartupError
from kvstore_service.admin import ClusterAdmin
from kvstore_service.cluster_stats import cluster_stats

_PATIENCE_S = 15.0


@dataclass(frozen=True, slots=True)
class Tier:
    name: str
    disk_read_bytes_per_s: float | None
    """None: in memory."""


# In the order in which they are measured: what was on a slow disk only is not in memory at once again.
TIERS = {tier.name: tier for tier in (Tier("dram", None), Tier("ssd", 550e6), Tier("hdd", 160e6))}
"""A SATA SSD, and a hard disk that reads one after the other."""


def tiers_named(names: Iterable[str], known: Mapping[str, Tier] = TIERS) -> tuple[Tier, ...]:
    """In the order in which they can be measured. Raises ConfigurationError for an unknown one, or for none."""
    wanted = list(names)
    for name in wanted:
        if name not in known:
            raise ConfigurationError(f"there is no tier {name!r}; known are {', '.join(known)}")
    if not wanted:
        raise ConfigurationError("nothing to measure: name a tier at least")
    return tuple(tier for tier in known.values() if tier.name in wanted)


def use_tier(address: str, tier: Tier) -> None:
    """Returns when what is stored is there, and nowhere else. Raises StartupError when it does not come to that,
    ServiceError."""
    limit_disks(address, tier.disk_read_bytes_per_s)
    deadline_s = time.monotonic() + _PATIENCE_S
    while left := _elsewhere(address, tier):
        if time.monotonic() > deadline_s:
            raise StartupError(
                f"{left} chunks are not where tier {tier.name} has them; give the nodes more memory"
            )
        time.sleep(0.05)


def limit_disks(address: str, read_bytes_per_s: float | None) -> None:
    """Raises ServiceError."""
    with ClusterAdmin(address) as cluster:
        for node in cluster.nodes():
            node.throttle_disk(read_bytes_per_s)


def _elsewhere(address: str, tier: Tier) -> int:
    stats = [node.stats for node in cluster_stats(address).nodes]
    in_memory = sum(found.gauges["memory_chunks"] for found in stats)
    return in_memory if tier.disk_read_bytes_per_s else sum(found.chunks for found in stats) - in_memory
