"""Makes files survive a power loss, and locks folders for one process."""

import fcntl
import logging
import os
from pathlib import Path

log = logging.getLogger(__name__)


def rename_durably(aside: Path, target: Path) -> None:
    """Renames `aside` to `target`, and returns once the rename survives a power loss. `aside` must be a synced file in
    the same folder. May block. Raises OSError."""
    aside.replace(target)
    sync_folder(target.parent)


def write_durably(target: Path, data: bytes, aside: Path) -> None:
    """Writes a file by way of `aside`, a name in the same folder, and returns once it survives a power loss. May block.
    Raises OSError, and then leaves the old file, and perhaps a part of the new one at `aside`."""
    with aside.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    rename_durably(aside, target)


def sync_folder(folder: Path) -> None:
    """Syncs a folder, so that the names in it survive a power loss. May block. Raises OSError."""
    folder_fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(folder_fd)
    finally:
        os.close(folder_fd)


def lock_folder(folder: Path, name: str) -> int:
    """Creates the folder when it is missing, and locks the file `name` in it. Returns the descriptor of the lock; this
    process has the lock until the descriptor is closed. Raises OSError, and BlockingIOError when another process has
    the lock."""
    folder.mkdir(parents=True, exist_ok=True)
    lock_fd = os.open(folder / name, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(lock_fd)
        raise
    return lock_fd


def relock_folder(folder: Path, name: str, lock_fd: int) -> int:
    """Creates and locks the folder again when it was removed. Returns the descriptor of the lock: a new one, or
    `lock_fd` when the folder is still there. Raises as `lock_folder` does, and then `lock_fd` stays open."""
    if holds_folder(folder, name, lock_fd):
        return lock_fd
    new_fd = lock_folder(folder, name)
    log.warning("%s was removed while in use, and was created again", folder)
    os.close(lock_fd)
    return new_fd


def holds_folder(folder: Path, name: str, lock_fd: int) -> bool:
    """Whether the locked file is still in the folder under its name. True when the check itself fails."""
    try:
        return os.path.samestat(os.fstat(lock_fd), (folder / name).stat())
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:
        return True
