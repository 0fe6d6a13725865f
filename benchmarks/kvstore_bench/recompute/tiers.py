"""Storage tiers: moves all documents to memory, or to a disk of limited speed."""

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from kvstore_codec.errors import ConfigurationError, StartupError
from kvstore_service.admin import ClusterAdmin
from kvstore_service.cluster_stats import cluster_stats

_MOVE_TIMEOUT_S = 15.0


@dataclass(frozen=True, slots=True)
class Tier:
    name: str
    disk_read_bytes_per_s: float | None
    """Read rate of the disk. None if the documents are in memory."""


# In the order of measurement. Memory comes first, because chunks that are only on a slow disk return to memory slowly.
TIERS = {tier.name: tier for tier in (Tier("dram", None), Tier("ssd", 550e6), Tier("hdd", 160e6))}
"""Memory, a SATA SSD, and a hard disk that reads sequentially."""


def tiers_named(names: Iterable[str], known: Mapping[str, Tier] = TIERS) -> tuple[Tier, ...]:
    """The tiers of these names, in the order of `known`. Raises ConfigurationError for an unknown name, or no name."""
    wanted = list(names)
    for name in wanted:
        if name not in known:
            raise ConfigurationError(f"there is no tier {name!r}; tiers are {', '.join(known)}")
    if not wanted:
        raise ConfigurationError("nothing to measure: name at least one tier")
    return tuple(tier for tier in known.values() if tier.name in wanted)


def use_tier(address: str, tier: Tier) -> None:
    """Moves all chunks to this tier, and blocks until none is elsewhere. Raises StartupError after 15 s, ServiceError
    when the cluster cannot be reached."""
    limit_disks(address, tier.disk_read_bytes_per_s)
    deadline_s = time.monotonic() + _MOVE_TIMEOUT_S
    while left := _elsewhere(address, tier):
        if time.monotonic() > deadline_s:
            raise StartupError(
                f"{left} chunks did not move to tier {tier.name} within {_MOVE_TIMEOUT_S:g} s; "
                "give the nodes more memory"
            )
        time.sleep(0.05)


def limit_disks(address: str, read_bytes_per_s: float | None) -> None:
    """Limits disk reads of all nodes; None removes the limit. Raises ServiceError when a node cannot be reached."""
    with ClusterAdmin(address) as cluster:
        for node in cluster.nodes():
            node.throttle_disk(read_bytes_per_s)


def _elsewhere(address: str, tier: Tier) -> int:
    """Number of chunks that are not where the tier needs them."""
    stats = [node.stats for node in cluster_stats(address).nodes]
    in_memory = sum(found.gauges["memory_chunks"] for found in stats)
    return in_memory if tier.disk_read_bytes_per_s else sum(found.chunks for found in stats) - in_memory
