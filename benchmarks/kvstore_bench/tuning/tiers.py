"""Tiers that reused text may be stored in."""

from kvstore_bench.recompute.tiers import TIERS as OF_KNOWN_SPEED
from kvstore_bench.recompute.tiers import Tier
from kvstore_cluster.disk_rate import FASTEST_BPS

DISK = Tier("disk", FASTEST_BPS)
"""The disk at its own speed. The limit is above every disk's speed; under a limit, chunks on disk are not in memory."""

TIERS = {**OF_KNOWN_SPEED, DISK.name: DISK}
"""All tiers, in the order in which they can be measured: memory first."""
