"""Settings from `KVSTORE_*` environment variables."""

import os
from collections.abc import Iterable, Mapping

from kvstore_api.environment import FORMER_DURABILITY, under_new_name, without_service_links

PREFIX = "KVSTORE_"


def from_environment(names: Iterable[str]) -> dict[str, str]:
    """The values of the settings `names` that the environment gives. The case of a variable does not matter, and an
    empty one gives nothing. Leaves out variables that Kubernetes sets for Services; only an address may be one."""
    variables: Mapping[str, str | None] = {name.lower(): value for name, value in os.environ.items()}
    variables = under_new_name(variables, FORMER_DURABILITY, _variable("put_durability"))
    variables = without_service_links(variables, [_variable(name) for name in names if name != "address"])
    return {name: value for name in names if (value := variables.get(_variable(name)))}


def _variable(name: str) -> str:
    return f"{PREFIX}{name}".lower()
