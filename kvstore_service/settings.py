"""Settings of the service: CLI flags before KVSTORE_* variables before the --config file before defaults.

What is empty is not set, wherever it stands: the next place decides.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import (
    BaseModel,
    ByteSize,
    ConfigDict,
    Field,
    SecretStr,
    ValidationError,
    field_validator,
    model_validator,
)

from kvstore_api.address import DEFAULT_ADDRESS
from kvstore_api.environment import FORMER_DURABILITY, under_new_name, without_service_links
from kvstore_cluster.arena import DEFAULT_BLOCK_BYTES
from kvstore_cluster.eviction import DEFAULT_POLICY, POLICIES
from kvstore_codec.errors import ConfigurationError
from kvstore_service.config_file import read_config, shortened
from kvstore_service.listen import Address

PREFIX = "KVSTORE_"
_MAX_CHARACTERS = 4096
"""Of a value: the longest path that Linux takes."""
_MAX_PROBLEMS = 8
"""That one error names."""
_MOST_BYTES = 1 << 60
"""Of a storage node; far beyond any machine, so that what is more is a mistake."""


class Settings(BaseModel):
    """What `kvstore serve` runs. Sizes are bytes, or text such as "4GiB"; `~` in a path is the user's home folder."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    nodes: int = Field(default=1, ge=1, le=256)
    """Storage nodes to start on this machine."""

    memory: ByteSize = Field(default=ByteSize(1 << 30), ge=DEFAULT_BLOCK_BYTES, le=_MOST_BYTES)
    """DRAM of each storage node."""

    listen: str = DEFAULT_ADDRESS
    """host:port of the coordinator; port 0 takes any free one. Storage nodes take free ports on the same host."""

    data_dir: Path | None = None
    """Where the catalogue and the disks of storage nodes live; a temporary folder when not set."""

    disk: ByteSize = Field(default=ByteSize(0), le=_MOST_BYTES)
    """Disk of each storage node, below `data_dir`; none when 0."""

    durability: Literal["memory", "relaxed", "durable"] = "relaxed"
    """What a put survives that does not say: `memory` is written to disk later, `relaxed` before it is acknowledged,
    `durable` also synced. Without disk it is `memory`."""

    policy: str = DEFAULT_POLICY
    """What is evicted first: `value`, `lru` or `s3-fifo`."""

    replicas: int | None = Field(default=None, ge=1, le=256)
    """Storage nodes that each chunk is put on; 1 when not set, or 2 on a Ray cluster of several nodes."""

    redis: SecretStr | None = None
    """redis://... of the catalogue; a file in `data_dir` when not set."""

    ray_address: str | None = None
    """A Ray cluster to run on, a storage node on each of its nodes; an own Ray on this machine when not set."""

    repair_bandwidth: ByteSize = Field(default=ByteSize(100 << 20), le=_MOST_BYTES)
    """Bytes a second that each storage node copies to others at most, after a loss or a join."""

    tls_cert: Path | None = None
    """Certificate chain (PEM) of the bulk ports; they speak plain TCP when not set."""

    tls_key: Path | None = None
    """Its private key (PEM)."""

    metrics_port: int | None = Field(default=None, ge=1, le=65535)
    """Port for Prometheus on the same host; none when not set."""

    @field_validator("*", mode="before")
    @classmethod
    def _is_plain(cls, value: object) -> object:
        if isinstance(value, bool):  # which is a whole number in Python
            raise ValueError("write a number or text, not true or false")  # noqa: TRY004 (pydantic's protocol)
        if isinstance(value, str) and len(value) > _MAX_CHARACTERS:
            raise ValueError(f"has {len(value)} characters; at most {_MAX_CHARACTERS}")
        if isinstance(value, str) and not _is_encodable(value):
            raise ValueError("has half of a surrogate pair, which no text has")
        return value

    @field_validator("*")
    @classmethod
    def _is_whole_path(cls, value: object) -> object:
        if not isinstance(value, Path):
            return value
        if "\0" in str(value):
            raise ValueError("a path has no NUL character")
        try:
            return value.expanduser()
        except RuntimeError as error:
            raise ValueError(
                "it begins with ~, but this user has no home folder; write the whole path"
            ) from error

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.disk and self.data_dir is None:
            raise ValueError("disk needs data_dir: what is on disk shall be found again")
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("tls_cert and tls_key come together")
        return self

    @field_validator("policy")
    @classmethod
    def _is_a_policy(cls, value: str) -> str:
        if value not in POLICIES:
            raise ValueError(f"known policies are {', '.join(POLICIES)}")
        return value

    @field_validator("listen")
    @classmethod
    def _is_an_address(cls, value: str) -> str:
        try:
            return str(Address.parse(value))
        except ConfigurationError as error:
            raise ValueError(str(error)) from error


@dataclass(frozen=True, slots=True)
class EffectiveSetting:
    """`value` as text, hidden where it is a secret; `source` is a flag, a variable, the file, or "default"."""

    name: str
    value: str
    source: str


def _is_encodable(text: str) -> bool:
    """Whether a path or an argument can be that; names of files need not be UTF-8."""
    try:
        os.fsencode(text)
    except UnicodeEncodeError:
        return False
    return True


def variable(name: str) -> str:
    """The environment variable of a setting."""
    return PREFIX + ("NODE_DURABILITY" if name == "durability" else name.upper())


def load_settings(config: Path | None = None, **flags: object) -> Settings:
    """`config` is a .yaml, .yml or .toml file; a flag that is None or empty was not given.

    Raises ConfigurationError that names every setting that is wrong or unknown, and where it is from.
    """
    return _load(config, flags)[0]


def effective_settings(config: Path | None = None, **flags: object) -> list[EffectiveSetting]:
    """What `load_settings` would use, and where each setting is from. Raises ConfigurationError likewise."""
    settings, sources = _load(config, flags)
    return [
        EffectiveSetting(name, _shown(getattr(settings, name)), sources.get(name, "default"))
        for name in Settings.model_fields
    ]


def _load(config: Path | None, flags: Mapping[str, object]) -> tuple[Settings, dict[str, str]]:
    """The settings, and the source of each that is not a default."""
    values: dict[str, object] = {}
    sources: dict[str, str] = {}
    for given, name_source in (
        ({} if config is None else read_config(config), lambda _: str(config)),
        (_environment(), variable),
        (flags, lambda name: "--" + name.replace("_", "-")),
    ):
        present = {name: value for name, value in given.items() if not _is_empty(value)}
        values |= present
        sources |= {name: name_source(name) for name in present}
    try:
        return Settings.model_validate(values), sources
    except ValidationError as error:
        problems = [_describe(problem, sources) for problem in error.errors()]
        more = f"; and {len(problems) - _MAX_PROBLEMS} more" if len(problems) > _MAX_PROBLEMS else ""
        raise ConfigurationError(
            f"cannot use these settings: {'; '.join(problems[:_MAX_PROBLEMS])}{more}"
        ) from None  # the cause quotes values, secrets too


def _environment() -> dict[str, str | None]:
    """Settings by name, from variables in capitals or not."""
    names = {variable(name).lower(): name for name in Settings.model_fields}
    given: dict[str, str | None] = {name.lower(): value for name, value in os.environ.items()}
    if given.get(FORMER_DURABILITY) == "default":  # only clients ever knew this value
        del given[FORMER_DURABILITY]
    given = under_new_name(given, FORMER_DURABILITY, variable("durability").lower())
    variables = {name: value for name, value in given.items() if name in names}
    return {names[name]: value for name, value in without_service_links(variables, names).items()}


def _is_empty(value: object) -> bool:
    return value is None or (isinstance(value, str) and not value.strip())


def _describe(problem: Any, sources: Mapping[str, str]) -> str:
    if not problem["loc"]:  # of several settings together
        return str(problem["msg"])
    name = str(problem["loc"][0])
    source = f" (from {sources[name]})" if name in sources else ""
    if problem["type"] == "extra_forbidden":
        return (
            f"there is no setting {shortened(name)!r}, known are {', '.join(Settings.model_fields)}{source}"
        )
    secret = Settings.model_fields[name].annotation == SecretStr | None
    value = "..." if secret else shortened(_as_given(problem["input"]))
    return f"{name} = {value}: {shortened(problem['msg'], 300)}{source}"


def _as_given(value: object) -> str:
    """Numbers stand bare, whether a file gave them as numbers or a flag as text; other text is quoted."""
    is_number = isinstance(value, str) and value.removeprefix("-").isdecimal()
    return str(value) if is_number else repr(value)


def _shown(value: object) -> str:
    match value:
        case None:
            return "not set"
        case SecretStr():
            return "hidden"
        case ByteSize():
            return value.human_readable()
        case _:
            return str(value)
