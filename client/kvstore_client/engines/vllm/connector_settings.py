"""Settings in `kv_connector_extra_config`: those that are not a client's, and a client's that have other defaults."""

import os
from collections.abc import Mapping
from typing import Any

from pydantic import TypeAdapter, ValidationError

from kvstore_client.settings.environment import from_environment
from kvstore_codec.errors import ConfigurationError

_YES_OR_NO = TypeAdapter(bool)

_CLOSE_TIMEOUT_S = 3.0
"""vLLM kills a process that has not ended 5 s after it was told to; a client waits 10 s for its last chunks."""
_MOST_DECODERS = 4
_IDLE_WAIT_S = 4.0
"""Encoding a chunk of a small model takes a tenth of a second and about doubles the time of a token on two cores: at
worst, with no pause of the engine, a few percent of all tokens."""


def with_defaults(given: Mapping[str, Any], *, on_cpu: bool) -> dict[str, Any]:
    """The settings `given`, and what neither they nor the environment give but has another default than in a client.

    A request that loads waits for all of its KV before its first layer is computed, so a load is decoded on all cores.
    Storing can wait, and does where the engine computes on the CPU, too (`on_cpu`).
    """
    defaults: dict[str, Any] = {
        "close_timeout_s": _CLOSE_TIMEOUT_S,
        "decode_threads": min(_MOST_DECODERS, os.cpu_count() or 1),
        "store_idle_wait_s": _IDLE_WAIT_S if on_cpu else 0.0,
    }
    return defaults | from_environment(defaults) | dict(given)


def whole_number(settings: dict[str, Any], name: str, default: int) -> int:
    """Take the setting `name`, at least 1, out of the settings. Raises ConfigurationError for anything else."""
    given = settings.pop(name, default)
    try:
        number = int(given)
    except (TypeError, ValueError, OverflowError):
        number = 0
    if number < 1 or isinstance(given, bool):
        raise ConfigurationError(
            f"kv_connector_extra_config: {name} is {given!r}; it must be a whole number, at least 1"
        )
    return number


def yes_or_no(settings: dict[str, Any], name: str, *, default: bool) -> bool:
    """Take the setting `name` out of the settings. Raises ConfigurationError where it says neither yes nor no."""
    given = settings.pop(name, default)
    try:
        return _YES_OR_NO.validate_python(given)
    except ValidationError as error:
        raise ConfigurationError(
            f"kv_connector_extra_config: {name} is {given!r}; it must be true or false"
        ) from error
