"""What it takes for a file to survive a power loss."""

import os
from pathlib import Path


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
