"""Folder for this machine's reproducible files: calibrations, profiles, tuned ratios, converted models."""

import os
import stat
import tempfile
from pathlib import Path

NOWHERE = Path(os.devnull) / "kvstore"
"""A folder that never exists and cannot be created: readers find nothing, and writers fail with an OSError."""


def default_cache_dir() -> Path:
    """`KVSTORE_CACHE_DIR`, else `$XDG_CACHE_HOME/kvstore`, else `~/.cache/kvstore`.

    A user without a home folder (a container that runs under a user id of its own) gets `kvstore-<uid>` in the folder
    for temporary files; this call creates it, readable by that user only. Where that fails, NOWHERE.
    """
    for variable, below in (("KVSTORE_CACHE_DIR", ""), ("XDG_CACHE_HOME", "kvstore")):
        if chosen := os.environ.get(variable):
            return expanded(Path(chosen)) / below
    try:
        return Path.home() / ".cache" / "kvstore"
    except RuntimeError:
        return _temporary_folder()


def expanded(path: Path) -> Path:
    """`path` with `~` expanded. Raises ValueError when that user has no home folder."""
    try:
        return path.expanduser()
    except RuntimeError as error:
        raise ValueError(
            f"{path} begins with ~, but this user has no home folder; give a full path"
        ) from error


def _temporary_folder() -> Path:
    """Every user may write into the folder for temporary files, so a folder that another user created is not used."""
    try:
        folder = Path(tempfile.gettempdir()) / f"kvstore-{os.getuid()}"
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
    except OSError:  # no folder for temporary files, or a file in its place
        return NOWHERE
    mine = stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid()
    return folder if mine and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH) else NOWHERE
