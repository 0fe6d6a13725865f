"""Tenants that operators had forgotten: the coordinator's list of them, which nodes apply."""

from collections.abc import Mapping
from dataclasses import dataclass, field

MAX_FORGOTTEN = 4096
"""Limit of the forgotten tenants that are remembered by name."""


@dataclass(frozen=True, slots=True)
class Forgotten:
    """Forgotten tenants, each with the generation of its last forgetting, a number that increases with every one.

    At most MAX_FORGOTTEN tenants are kept by name, the last ones. `floor` is the newest generation that is no longer
    kept by name: a node that has not applied it cannot know whose chunks to remove, and removes those of all tenants.
    """

    tenants: Mapping[str, int] = field(default_factory=dict)
    floor: int = 0

    @property
    def newest(self) -> int:
        """The newest generation, 0 when no tenant was ever forgotten."""
        return max((self.floor, *self.tenants.values()))

    def generation_of(self, tenant: str) -> int:
        """The generation since which chunks of this tenant are kept."""
        return max(self.tenants.get(tenant, 0), self.floor)

    def since(self, generation: int) -> "Forgotten | None":
        """What a node must apply that has applied everything up to `generation`. None when there is nothing."""
        if self.newest <= generation:
            return None
        return Forgotten({name: last for name, last in self.tenants.items() if last > generation}, self.floor)

    def merged(self, later: "Forgotten") -> "Forgotten":
        """These forgotten tenants and `later` ones together."""
        tenants = {**self.tenants, **later.tenants}
        floor = max(self.floor, later.floor)
        kept = sorted(tenants, key=tenants.__getitem__, reverse=True)
        dropped = kept[MAX_FORGOTTEN:]
        floor = max([floor, *(tenants[name] for name in dropped)])
        return Forgotten(
            {name: tenants[name] for name in kept[:MAX_FORGOTTEN] if tenants[name] > floor}, floor
        )
