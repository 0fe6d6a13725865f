"""Where text may be stored that is reused."""

from kvstore_bench.recompute.tiers import TIERS as OF_KNOWN_SPEED
from kvstore_bench.recompute.tiers import Tier
from kvstore_cluster.slow_disk import FASTEST_BPS

DISK = Tier("disk", FASTEST_BPS)
"""As it is: a limit that no disk reaches, under which what is on disk is only there."""

TIERS = {**OF_KNOWN_SPEED, DISK.name: DISK}
"""In the order in which they can be measured: memory first."""
