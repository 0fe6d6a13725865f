"""The instructions of image/Dockerfile."""

import json
import re
import tomllib
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
IMAGE = ROOT / "image"
PINNED = re.compile(r"[a-z0-9./-]+:v?[0-9]+\.[0-9]+[^@]*(@sha256:[0-9a-f]{64})?")
"""An image with a version, and perhaps a digest."""


def instructions() -> list[tuple[str, str]]:
    """(name, arguments) of each instruction, in order. Arguments of several lines are joined."""
    text = re.sub(r"^#.*\n", "", (IMAGE / "Dockerfile").read_text(), flags=re.MULTILINE)
    lines = filter(None, re.sub(r"\\\n\s*", "", text).splitlines())
    return [(name, arguments) for name, _, arguments in (line.partition(" ") for line in lines)]


def arguments_of(name: str) -> list[str]:
    return [arguments for found, arguments in instructions() if found == name]


def defaults() -> dict[str, str]:
    """Defaults of the build arguments."""
    return dict(argument.split("=", 1) for argument in arguments_of("ARG"))


def flavours() -> dict[str, dict[str, Any]]:
    """The targets of image/bake.json, by name."""
    found: dict[str, dict[str, Any]] = json.loads((IMAGE / "bake.json").read_text())["target"]
    return found


def project() -> dict[str, Any]:
    found: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return found
