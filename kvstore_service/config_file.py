"""Reads the --config file: a flat table of settings in YAML or TOML. Any content gives either a table or a short error
text."""

import os
import stat
import tomllib
from pathlib import Path
from typing import Any

import yaml

from kvstore_codec.errors import ConfigurationError

MAX_BYTES = 64 << 10
MAX_DEPTH = 8
"""Most nesting levels of a YAML document. A table of settings has two."""
_MOST_BITS = 63
"""Most bits of an integer; no setting needs more. Python refuses to print an integer of more than 4,300 digits."""
_MAX_REASON = 300
"""Most characters of a parser's message in an error text."""


def read_config(path: Path) -> dict[str, Any]:
    """Reads a table of settings from a regular file. Other files, such as pipes, are refused because reading them may
    block forever. Raises ConfigurationError, whose text names the file and the remedy."""
    try:
        with open(path, "rb", opener=_open_at_once) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise _unusable(path, "it is not a regular file; write the settings into a regular file")
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
                raise ConfigurationError(f"the configuration {path} is neither a .yaml nor a .toml file")
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
                f"the configuration {path} names a setting {shortened(repr(name))}; names must be text"
            )
    return content


def shortened(text: str, most: int = 100) -> str:
    """The text, cut to `most` characters if it is longer."""
    return text if len(text) <= most else f"{text[:most]}... ({len(text)} characters)"


def _open_at_once(path: str, flags: int) -> int:
    """Opens a file without blocking, even if it is a pipe without a writer."""
    return os.open(path, flags | os.O_NONBLOCK)


def _require_plain(path: Path, text: str) -> None:
    """Raises ConfigurationError for a YAML document with aliases or deep nesting, which could grow when it is loaded.
    Parsing events does not recurse, so it is safe for any nesting."""
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
    """Raises ConfigurationError for an integer of more than _MOST_BITS bits anywhere in the document."""
    values = [content]
    while values:
        value = values.pop()
        if isinstance(value, int) and value.bit_length() > _MOST_BITS:
            raise _unusable(
                path, f"it contains an integer of more than {_MOST_BITS} bits; no setting is that large"
            )
        if isinstance(value, dict):
            values += [*value.keys(), *value.values()]
        elif isinstance(value, list | tuple | set | frozenset):
            values += value


def _unusable(path: Path, reason: str) -> ConfigurationError:
    return ConfigurationError(f"cannot read the configuration {path}: {reason}")
