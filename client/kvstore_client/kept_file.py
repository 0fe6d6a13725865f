"""Files in `cache_dir` that are kept between runs: replaced whole, and ignored when they are damaged."""

import os
import tempfile
from pathlib import Path

UNUSABLE = (OSError, ValueError, TypeError, KeyError, AttributeError, ArithmeticError, RecursionError)
"""What reading and interpreting a JSON file raises when it cannot be read, is no JSON, or holds something else than
expected."""


def replace_file(path: Path, data: bytes) -> None:
    """Write the file and its folder, so that every reader sees either the former file or all of `data`. Not synced.
    Raises OSError when it cannot be written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".unfinished-", delete=False) as file:
        try:
            file.write(data)
            file.flush()
            os.replace(file.name, path)  # noqa: PTH105
        except OSError:
            Path(file.name).unlink(missing_ok=True)
            raise
