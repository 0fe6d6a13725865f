"""The folder in which parsers of files find hostile ones."""

import atexit
import functools
import shutil
import tempfile
from pathlib import Path

_IN_MEMORY = Path("/dev/shm")  # noqa: S108 (the folder in it has a random name)


@functools.cache
def folder() -> Path:
    """A new folder, in memory where the system has such, because files cost little there. Removed at the end of the
    process."""
    made = Path(tempfile.mkdtemp(prefix="kvstore-hostile-", dir=_IN_MEMORY if _IN_MEMORY.is_dir() else None))
    atexit.register(shutil.rmtree, made, ignore_errors=True)
    return made
