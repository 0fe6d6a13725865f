"""Files in `cache_dir`: replaced atomically, and ignored when damaged."""

import os
import tempfile
from pathlib import Path

UNUSABLE = (OSError, ValueError, TypeError, KeyError, AttributeError, ArithmeticError, RecursionError)
"""Exceptions raised by reading and interpreting a JSON file that is unreadable, invalid, or has unexpected content."""


def replace_file(path: Path, data: bytes) -> None:
    """Write the file, creating its folder, so that every reader sees either the old file or all of `data`. Not synced.
    Raises OSError when writing fails."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".unfinished-", delete=False) as file:
        try:
            file.write(data)
            file.flush()
            os.replace(file.name, path)  # noqa: PTH105
        except OSError:
            Path(file.name).unlink(missing_ok=True)
            raise
