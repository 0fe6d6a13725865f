"""Settings in `kv_connector_extra_config` that are not those of a client."""

from typing import Any

from pydantic import TypeAdapter, ValidationError

from kvstore_codec.errors import ConfigurationError

_YES_OR_NO = TypeAdapter(bool)


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
