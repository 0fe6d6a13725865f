"""Where text may be stored that is reused."""

from collections.abc import Iterable

from kvstore_cluster.disk.speed import FASTEST_BPS
from kvstore_codec.errors import ConfigurationError
from kvstore_service.bench.recompute.tiers import TIERS as OF_KNOWN_SPEED
from kvstore_service.bench.recompute.tiers import Tier

DISK = Tier("disk", FASTEST_BPS)
"""As it is: a limit that no disk reaches, under which what is on disk is only there."""

TIERS = {**OF_KNOWN_SPEED, DISK.name: DISK}
"""In the order in which they can be measured: memory first."""


def tiers_named(names: Iterable[str]) -> tuple[Tier, ...]:
    """In the order of TIERS. Raises ConfigurationError for an unknown one, or for none."""
    wanted = set(names)
    if unknown := wanted - TIERS.keys():
        raise ConfigurationError(f"there is no tier {min(unknown)!r}; known are {', '.join(TIERS)}")
    if not wanted:
        raise ConfigurationError("nothing to tune for: name a tier at least")
    return tuple(tier for tier in TIERS.values() if tier.name in wanted)
