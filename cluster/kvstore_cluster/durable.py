"""What it takes for a file to survive a power loss, and for a folder to belong to one process."""

import fcntl
import logging
import os
from pathlib import Path

log = logging.getLogger(__name__)


def rename_durably(aside: Path, target: Path) -> None:
    """Puts `aside`, written and synced in the same folder, in the place of `target`; returns once the rename would
    survive a power loss. Raises OSError."""
    aside.replace(target)
    sync_folder(target.parent)


def sync_folder(folder: Path) -> None:
    """Returns once the names in `folder` would survive a power loss. Raises OSError."""
    folder_fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(folder_fd)
    finally:
        os.close(folder_fd)


def lock_folder(folder: Path, name: str) -> int:
    """Makes the folder when it is missing and locks the file `name` in it; the lock is this process's until the
    descriptor is closed. Raises OSError, BlockingIOError when another process has it."""
    folder.mkdir(parents=True, exist_ok=True)
    lock_fd = os.open(folder / name, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(lock_fd)
        raise
    return lock_fd


def relock_folder(folder: Path, name: str, lock_fd: int) -> int:
    """Makes and locks the folder again where it was removed, and returns the descriptor of its lock, which is the old
    one where nothing was. Raises as `lock_folder` does; then the old one stays."""
    if holds_folder(folder, name, lock_fd):
        return lock_fd
    new_fd = lock_folder(folder, name)
    log.warning("%s was removed while it is in use, and was made again", folder)
    os.close(lock_fd)
    return new_fd


def holds_folder(folder: Path, name: str, lock_fd: int) -> bool:
    """Whether the locked file is still the one of that name. Where that cannot be told, it is taken to be."""
    try:
        return os.path.samestat(os.fstat(lock_fd), (folder / name).stat())
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:
        return True
