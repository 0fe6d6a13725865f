"""The --config file: a flat table of settings in YAML or TOML. Whatever a file holds, reading it ends in a table or in
a short sentence."""

import os
import stat
import tomllib
from pathlib import Path
from typing import Any

import yaml

from kvstore_codec.errors import ConfigurationError

MAX_BYTES = 64 << 10
MAX_DEPTH = 8
"""Levels of a YAML document: a table of settings has two."""
_MOST_BITS = 63
"""Of a whole number: no setting is as large. Python refuses to print one of more than 4,300 digits."""
_MAX_REASON = 300
"""Characters of what a parser says."""


def read_config(path: Path) -> dict[str, Any]:
    """Reads a regular file only: what else there is may keep a reader waiting for ever. Raises ConfigurationError that
    names the file and what to do."""
    try:
        with open(path, "rb", opener=_open_at_once) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise _unusable(path, "it is no regular file; write the settings into one")
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
    _require_small_numbers(path, content)
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


def _open_at_once(path: str, flags: int) -> int:
    """Does not wait for somebody who writes into a pipe."""
    return os.open(path, flags | os.O_NONBLOCK)


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


def _require_small_numbers(path: Path, content: object) -> None:
    """Raises ConfigurationError for a whole number that cannot be shown, wherever it stands in the document."""
    values = [content]
    while values:
        value = values.pop()
        if isinstance(value, int) and value.bit_length() > _MOST_BITS:
            raise _unusable(
                path, f"it has a whole number of more than {_MOST_BITS} bits; no setting is as large"
            )
        if isinstance(value, dict):
            values += [*value.keys(), *value.values()]
        elif isinstance(value, list | tuple | set | frozenset):
            values += value


def _unusable(path: Path, reason: str) -> ConfigurationError:
    return ConfigurationError(f"cannot read the configuration {path}: {reason}")
