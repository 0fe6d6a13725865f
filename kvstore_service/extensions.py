"""What other packages add to the service by entry points: commands (`kvstore.commands`) and checks of `kvstore doctor`
(`kvstore.checks`)."""

from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Any, Literal

Group = Literal["kvstore.commands", "kvstore.checks"]
INSTALL = "pip install 'kvstore-service[bench]'"


@dataclass(frozen=True, slots=True)
class Extension:
    """One entry point. `reason` says why it cannot be imported; empty when `value` is what it names."""

    name: str
    value: Any = None
    reason: str = ""


def load_extensions(group: Group) -> list[Extension]:
    """All entry points of a group by name. One that cannot be imported is among them, so that the others work."""
    loaded = []
    for entry in sorted(entry_points(group=group), key=lambda entry: entry.name):
        try:
            loaded.append(Extension(entry.name, entry.load()))
        except (ImportError, AttributeError) as error:
            loaded.append(Extension(entry.name, reason=str(error)))
    return loaded
