"""Chunks given on the command line."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from kvstore_codec.errors import ConfigurationError

if TYPE_CHECKING:
    from kvstore_service.admin import ChunkPattern


def chunk_patterns(names: list[str] | None, file: Path | None) -> "list[ChunkPattern]":
    """Reads the chunks that arguments or a file name. Raises ConfigurationError for others."""
    from kvstore_service.admin import ChunkPattern

    lines: list[str] = []
    if file is not None:
        try:
            text = sys.stdin.read() if str(file) == "-" else file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigurationError(f"cannot read chunks from {file}: {error}") from error
        lines = [line.strip() for line in text.splitlines() if line.strip()]
    return [ChunkPattern.parse(name) for name in (*(names or ()), *lines)]
