"""The --config file: a flat table of settings in YAML or TOML. Whatever a file holds, reading it ends in a table or in
a short sentence."""

import tomllib
from pathlib import Path
from typing import Any

import yaml

from kvstore_codec.errors import ConfigurationError

MAX_BYTES = 64 << 10
MAX_DEPTH = 8
"""Levels of a YAML document: a table of settings has two."""
_MAX_REASON = 300
"""Characters of what a parser says."""


def read_config(path: Path) -> dict[str, Any]:
    """Raises ConfigurationError that names the file and what to do."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise _unusable(
                path, f"it has more than {MAX_BYTES} bytes; a table of settings has a few hundred"
            )
        text = data.decode()
        match path.suffix:
            case ".yaml" | ".yml":
                _require_plain(path, text)
                content = yaml.safe_load(text) or {}
            case ".toml":
                content = tomllib.loads(text)
            case _:
                raise ConfigurationError(f"{path} is neither .yaml nor .toml")
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise _unusable(path, shortened(" ".join(str(error).split()), _MAX_REASON)) from error
    except RecursionError as error:
        raise _unusable(path, "it is nested too deeply; settings are one flat table") from error
    if not isinstance(content, dict):
        raise ConfigurationError(
            f"the configuration {path} must be a table of settings, not a {type(content).__name__}; "
            "write lines such as memory: 4GiB"
        )
    for name in content:
        if not isinstance(name, str):
            raise ConfigurationError(
                f"the configuration {path} names a setting {shortened(repr(name))}, which is not text"
            )
    return content


def shortened(text: str, most: int = 100) -> str:
    """The text, or its beginning where it has more than `most` characters."""
    return text if len(text) <= most else f"{text[:most]}... ({len(text)} characters)"


def _require_plain(path: Path, text: str) -> None:
    """Raises ConfigurationError for a document that would grow when it is loaded. Reading events needs no stack."""
    depth = 0
    for event in yaml.parse(text, yaml.SafeLoader):
        line = event.start_mark.line + 1 if event.start_mark else 0
        if isinstance(event, yaml.AliasEvent):
            raise _unusable(
                path, f"line {line} uses the alias *{shortened(event.anchor or '')}; write the value there"
            )
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        if depth > MAX_DEPTH:
            raise _unusable(path, f"line {line} is nested too deeply; settings are one flat table")


def _unusable(path: Path, reason: str) -> ConfigurationError:
    return ConfigurationError(f"cannot read the configuration {path}: {reason}")
