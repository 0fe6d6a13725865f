"""All settings of a client, and the flat names under which users give them."""

import difflib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import Field, SecretStr, field_validator
from pydantic.fields import FieldInfo

from kvstore_api.address import DEFAULT_ADDRESS
from kvstore_client.cache_dir import default_cache_dir, expanded
from kvstore_client.logs import LogFormat, LogLevel
from kvstore_client.settings.encodings import EncodingSettings
from kvstore_client.settings.environment import PREFIX, from_environment
from kvstore_client.settings.fetch import FetchSettings
from kvstore_client.settings.group import SettingsGroup
from kvstore_client.settings.recompute import RecomputeSettings
from kvstore_client.settings.reprefill import ReprefillSettings
from kvstore_client.settings.security import SecuritySettings
from kvstore_client.settings.store import StoreSettings
from kvstore_client.settings.timeouts import Timeouts
from kvstore_client.settings.tracing import TracingSettings
from kvstore_client.settings.transport import TransportSettings
from kvstore_codec.errors import ConfigurationError


class ClientSettings(SettingsGroup):
    """How a client looks up, fetches and stores. Times are in seconds, sizes in bytes.

    Settings are given by their flat names (docs/settings.md) and read in groups: `ClientSettings(lookup_timeout_s=2)`
    has `timeouts.lookup_s == 2`. A setting that is not given comes from its `KVSTORE_*` environment variable, and else
    has its default. An empty variable means that the setting is not given. `~` in a path is the user's home folder.
    """

    address: str = DEFAULT_ADDRESS
    """Address of the coordinator, `host:port`. `tcp://host:port`, as Kubernetes writes it, means the same."""

    tenant_salt: SecretStr = SecretStr("")
    """Secret that goes into the name of every chunk. Clients with different salts cannot find each other's chunks."""

    cache_dir: Path = Field(default_factory=default_cache_dir)
    """Folder for files that are kept between runs: calibrations, measured profiles and losses. Several processes may
    share it. If it cannot be written, these files are made or downloaded again in every run; nothing else changes.
    Default: `$XDG_CACHE_HOME/kvstore`, else `~/.cache/kvstore`."""

    log_format: LogFormat | None = None
    """How the log lines of the first client in a process are written to stderr: `text` or `json`, one object a line.
    Without it they go where the engine's go."""

    log_level: LogLevel = LogLevel.INFO
    """The least important lines that `log_format` writes: `debug`, `info`, `warning` or `error`."""

    timeouts: Timeouts = Field(default_factory=Timeouts)
    encodings: EncodingSettings = Field(default_factory=EncodingSettings)
    fetch: FetchSettings = Field(default_factory=FetchSettings)
    store: StoreSettings = Field(default_factory=StoreSettings)
    recompute: RecomputeSettings = Field(default_factory=RecomputeSettings)
    reprefill: ReprefillSettings = Field(default_factory=ReprefillSettings)
    security: SecuritySettings = Field(default_factory=SecuritySettings)
    transport: TransportSettings = Field(default_factory=TransportSettings)
    tracing: TracingSettings = Field(default_factory=TracingSettings)

    def __init__(self, **given: Any) -> None:
        """Raises ConfigurationError for a name that is no setting, and pydantic.ValidationError for a value that a
        setting cannot have."""
        known = settings_by_name()
        if unknown := given.keys() - known.keys():
            raise ConfigurationError(_no_such(sorted(unknown), known))
        values: dict[str, Any] = {}
        for name, value in (from_environment(known) | given).items():
            group = known[name].group
            (values if group is None else values.setdefault(group, {}))[name] = value
        super().__init__(**values)

    @field_validator("address")
    @classmethod
    def _without_scheme(cls, value: str) -> str:
        return value.removeprefix("tcp://")

    @field_validator("tenant_salt")
    @classmethod
    def _encodable(cls, value: SecretStr) -> SecretStr:
        # Not a UnicodeEncodeError: that one carries the whole text.
        if any("\ud800" <= character <= "\udfff" for character in value.get_secret_value()):
            raise ValueError("must be valid Unicode text")
        return value

    @field_validator("cache_dir", mode="before")
    @classmethod
    def _empty_is_unset(cls, value: object) -> object:
        return value or default_cache_dir()

    @field_validator("cache_dir")
    @classmethod
    def _expand_home(cls, value: Path) -> Path:
        return expanded(value)


@dataclass(frozen=True, slots=True)
class Setting:
    """One setting, as users give it."""

    name: str
    group: str | None
    """Field of ClientSettings that holds its group; None for a field of ClientSettings itself."""
    attribute: str
    """Its field in that group."""
    info: FieldInfo

    @property
    def variable(self) -> str:
        """Its environment variable."""
        return f"{PREFIX}{self.name.upper()}"

    def of(self, settings: ClientSettings) -> Any:
        """Its value in `settings`."""
        return getattr(settings if self.group is None else getattr(settings, self.group), self.attribute)


@cache
def settings_by_name() -> Mapping[str, Setting]:
    """Every setting by its flat name, those of ClientSettings itself first."""
    found = sorted(_settings(ClientSettings, None), key=lambda setting: setting.group is not None)
    return {setting.name: setting for setting in found}


def flat_name(location: tuple[int | str, ...]) -> str:
    """The flat name of the setting that is wrong at the `location` of a pydantic error, with the place in its value."""
    in_group = location[0] not in settings_by_name()
    return ".".join(map(str, location[1:] if in_group else location))


def _settings(model: type[SettingsGroup], group: str | None) -> Iterator[Setting]:
    for attribute, info in model.model_fields.items():
        kind = info.annotation
        if isinstance(kind, type) and issubclass(kind, SettingsGroup):
            yield from _settings(kind, attribute)
        else:
            yield Setting(info.alias or attribute, group, attribute, info)


def _no_such(unknown: Iterable[str], known: Iterable[str]) -> str:
    near = {name: difflib.get_close_matches(name, known, 3) for name in unknown}
    names = ", ".join(
        f"{name} (did you mean {' or '.join(close)}?)" if close else name for name, close in near.items()
    )
    listed = "" if all(near.values()) else f"; known are {', '.join(known)}"
    return f"there is no client setting {names}{listed}"
