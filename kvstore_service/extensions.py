"""Extensions that other packages register as entry points: commands of the CLI (`kvstore.commands`) and checks of
`kvstore doctor` (`kvstore.checks`)."""

from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Any, Literal

Group = Literal["kvstore.commands", "kvstore.checks"]
INSTALL = "pip install 'kvstore-service[bench]'"


@dataclass(frozen=True, slots=True)
class Extension:
    """One entry point. `value` is the imported object. `reason` says why the import failed, or is empty."""

    name: str
    value: Any = None
    reason: str = ""


def load_extensions(group: Group) -> list[Extension]:
    """All entry points of a group, sorted by name, including those that cannot be imported."""
    loaded = []
    for entry in sorted(entry_points(group=group), key=lambda entry: entry.name):
        try:
            loaded.append(Extension(entry.name, entry.load()))
        except (ImportError, AttributeError) as error:
            loaded.append(Extension(entry.name, reason=str(error)))
    return loaded
