"""Settings of the service: CLI flags before KVSTORE_* variables before the --config file before defaults."""

import tomllib
from pathlib import Path
from typing import Any

import yaml
from pydantic import ByteSize, Field, ValidationError, field_validator
from pydantic_settings import (
    BaseSettings,
    InitSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from kvstore_api.address import DEFAULT_ADDRESS
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
    """Where the catalogue lives; a temporary folder when not set."""

    metrics_port: int | None = Field(default=None, ge=1, le=65535)
    """Port for Prometheus on the same host; none when not set."""

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
