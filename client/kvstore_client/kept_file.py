"""Files in `cache_dir`: replaced atomically, and ignored when damaged."""

import os
import tempfile
from pathlib import Path
from typing import Any

from kvstore_codec import bounded

_MOST_BYTES = 1 << 20
_MOST_VALUES = 20_000
"""An honest file has a few hundred values, and that of a checkpoint three for each of its files."""
UNUSABLE = (OSError, ValueError, TypeError, KeyError, AttributeError, ArithmeticError, RecursionError)
"""Exceptions raised by reading and interpreting a JSON file that is unreadable, invalid, or has unexpected content."""


def read_file(path: Path) -> Any:
    """Parse a JSON file. Raises FileNotFoundError, NotADirectoryError, or others of UNUSABLE."""
    with path.open("rb") as file:
        data = file.read(_MOST_BYTES + 1)
    if len(data) > _MOST_BYTES:
        raise ValueError(f"it has more than {_MOST_BYTES} bytes")
    return bounded.loads(data.decode(), _MOST_VALUES)


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
