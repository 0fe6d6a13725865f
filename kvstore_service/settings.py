"""Settings of the service: CLI flags before KVSTORE_* variables before the --config file before defaults."""

import tomllib
from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import ByteSize, Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic_settings import (
    BaseSettings,
    InitSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from kvstore_api.address import DEFAULT_ADDRESS
from kvstore_cluster.eviction import DEFAULT_POLICY, POLICIES
from kvstore_codec.errors import ConfigurationError
from kvstore_service.listen import Address


class Settings(BaseSettings):
    """What `kvstore serve` runs. Sizes are bytes, or text such as "4GiB"."""

    model_config = SettingsConfigDict(env_prefix="KVSTORE_", extra="forbid", frozen=True)

    nodes: int = Field(default=1, ge=1)
    """Storage nodes to start on this machine."""

    memory: ByteSize = ByteSize(1 << 30)
    """DRAM of each storage node."""

    listen: str = DEFAULT_ADDRESS
    """host:port of the coordinator; port 0 takes any free one. Storage nodes take free ports on the same host."""

    data_dir: Path | None = None
    """Where the catalogue and the disks of storage nodes live; a temporary folder when not set."""

    disk: ByteSize = ByteSize(0)
    """Disk of each storage node, below `data_dir`; none when 0."""

    durability: Literal["memory", "relaxed", "durable"] = "relaxed"
    """What a put survives that does not say: `memory` is written to disk later, `relaxed` before it is acknowledged,
    `durable` also synced. Without disk it is `memory`."""

    policy: str = DEFAULT_POLICY
    """What is evicted first: `value`, `lru` or `s3-fifo`."""

    replicas: int | None = Field(default=None, ge=1)
    """Storage nodes that each chunk is put on; 1 when not set, or 2 on a Ray cluster of several nodes."""

    redis: SecretStr | None = None
    """redis://... of the catalogue; a file in `data_dir` when not set."""

    ray_address: str | None = None
    """A Ray cluster to run on, a storage node on each of its nodes; an own Ray on this machine when not set."""

    repair_bandwidth: ByteSize = ByteSize(100 << 20)
    """Bytes a second that each storage node copies to others at most, after a loss or a join."""

    tls_cert: Path | None = None
    """Certificate chain (PEM) of the bulk ports; they speak plain TCP when not set."""

    tls_key: Path | None = None
    """Its private key (PEM)."""

    metrics_port: int | None = Field(default=None, ge=1, le=65535)
    """Port for Prometheus on the same host; none when not set."""

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


def load_settings(config: Path | None = None, **flags: object) -> Settings:
    """`config` is a .yaml, .yml or .toml file; a flag that is None was not given.

    Raises ConfigurationError that names every setting that is wrong or unknown.
    """
    in_file = {} if config is None else _read(config)

    class Layered(Settings):
        @classmethod
        def settings_customise_sources(
            cls,
            settings_cls: type[BaseSettings],
            init_settings: PydanticBaseSettingsSource,
            env_settings: PydanticBaseSettingsSource,
            dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003 (the library's signature)
            file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003
        ) -> tuple[PydanticBaseSettingsSource, ...]:
            return init_settings, env_settings, InitSettingsSource(settings_cls, in_file)

    given: dict[str, Any] = {name: value for name, value in flags.items() if value is not None}
    try:
        return Layered(**given)
    except ValidationError as error:
        problems = "; ".join(_describe(problem) for problem in error.errors())
        raise ConfigurationError(f"cannot use these settings: {problems}") from error


def _describe(problem: Any) -> str:
    name = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        return f"there is no setting {name!r}, known are {', '.join(Settings.model_fields)}"
    return f"{name} = {problem['input']!r}: {problem['msg']}"


def _read(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
        match path.suffix:
            case ".yaml" | ".yml":
                content = yaml.safe_load(text) or {}
            case ".toml":
                content = tomllib.loads(text)
            case _:
                raise ConfigurationError(f"{path} is neither .yaml nor .toml")
    except (OSError, UnicodeDecodeError, yaml.YAMLError, tomllib.TOMLDecodeError) as error:
        raise ConfigurationError(f"cannot read the configuration {path}: {error}") from error
    if not isinstance(content, dict):
        raise ConfigurationError(f"the configuration {path} must be a table of settings, not {content!r}")
    for name in content:
        if not isinstance(name, str):
            raise ConfigurationError(f"the configuration {path} names a setting {name!r}, which is not text")
    return content
