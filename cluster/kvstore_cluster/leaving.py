"""The chunks of forgotten tenants while a node removes them, slice after slice."""

from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Leaving:
    """The chunks in slots below `end` of tenants for which `concerns` is true, except those that were stored since: a
    new chunk may get the slot of a removed one."""

    end: int
    concerns: Callable[[str], bool]
    arrived: set[int] = field(default_factory=set)

    def includes(self, slot: int, tenant: str) -> bool:
        return slot < self.end and slot not in self.arrived and self.concerns(tenant)
