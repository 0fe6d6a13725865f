"""Whether files have changed."""

from pathlib import Path
from typing import TypeAlias

FileStamp: TypeAlias = tuple[tuple[int, ...], ...]


def stamp_of(*paths: Path | None) -> FileStamp:
    """A value that changes with the content of the files, and with who may read them. A missing file, and None, have no
    part in it."""
    return tuple(map(_stamp, paths))


def _stamp(path: Path | None) -> tuple[int, ...]:
    try:
        found = path.stat() if path is not None else None
    except OSError:
        found = None
    if found is None:
        return ()
    return (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)
