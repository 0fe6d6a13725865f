"""Settings that differ from others in a few."""

from typing import Any

from kvstore_client.settings import ClientSettings, settings_by_name


def changed(settings: ClientSettings, **given: Any) -> ClientSettings:
    """`settings` with those that are `given` by their flat names."""
    known = {name: setting.of(settings) for name, setting in settings_by_name().items()}
    return ClientSettings(**(known | given))
