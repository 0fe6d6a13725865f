"""A folder for files that live as long as a process, such as Ray's; what killed processes left is removed.

A folder belongs to the process that holds the lock on the file `owner` in it. The kernel gives the lock up when that
process ends, however it ends, so a folder whose lock can be had is a leftover.
"""

import fcntl
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from kvstore_codec.errors import StartupError

if TYPE_CHECKING:
    import psutil

log = logging.getLogger(__name__)

_PREFIX = "kvstore-"
_OWNER = "owner"
# The path of a socket may have 107 bytes, and Ray puts them far below the folder.
_DEEPEST = f"/{_PREFIX}12345678/ray/session_2026-01-31_12-00-00_123456_4194304/sockets/plasma_store"
LONGEST_PARENT_BYTES = 107 - len(_DEEPEST)
# Ray writes half a MiB of logs until it is up.
_PROBE_BYTES = 1 << 20
_VARIABLES = ("TMPDIR", "TEMP", "TMP")
_DEFAULTS = ("/tmp", "/var/tmp")  # noqa: S108 (tried for whether they can be written)
_RAY_PROGRAMS = ("gcs_server", "raylet")


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """A new folder with a short path, removed at the end. First removes what this user's killed processes left beside
    it, and ends the Ray processes that still use that. Raises StartupError when no folder can be had."""
    parent = _parent()
    _clear_leftovers(parent)
    try:
        folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent))
    except OSError as error:
        raise StartupError(f"no temporary folder can be made in {parent}: {error.strerror}") from error
    lock_fd = -1
    try:
        lock_fd = _own(folder)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if lock_fd >= 0:
            os.close(lock_fd)


def _parent() -> Path:
    """The first folder that the environment names, or else the system's, that can be used. Raises StartupError."""
    named = [(f"{name}=", os.environ[name]) for name in _VARIABLES if os.environ.get(name)]
    refused: list[str] = []
    for source, path in [*named, *(("", path) for path in _DEFAULTS)]:
        reason = _unusable(path)
        if reason is None:
            if refused:
                log.warning("temporary files go to %s: %s", path, "; ".join(refused))
            return Path(path).absolute()
        refused.append(f"{source}{path} {reason}")
    raise StartupError(
        f"no folder for temporary files: {'; '.join(refused)}. Set TMPDIR to a writable folder whose path has at most "
        f"{LONGEST_PARENT_BYTES} bytes"
    )


def _unusable(path: str) -> str | None:
    """Why Ray's files cannot be there."""
    length = len(os.fsencode(Path(path).absolute()))
    if length > LONGEST_PARENT_BYTES:
        return f"has {length} bytes, more than the {LONGEST_PARENT_BYTES} that leave room for Ray's sockets"
    try:
        with tempfile.TemporaryFile(dir=path, buffering=0) as probe:
            probe.write(bytes(_PROBE_BYTES))
            if probe.tell() < _PROBE_BYTES:
                return f"has less than {_PROBE_BYTES >> 20} MiB of space left"
    except OSError as error:
        return f"cannot be used ({error.strerror})"
    return None


def _own(folder: Path) -> int:
    """Takes the lock before others can see it: one that looks for leftovers must never get it first."""
    unseen = folder / f".{_OWNER}"
    lock_fd = os.open(unseen, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    fcntl.flock(lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.write(lock_fd, f"{os.getpid()}\n".encode())
    unseen.rename(folder / _OWNER)
    return lock_fd


def _clear_leftovers(parent: Path) -> None:
    for owner in parent.glob(f"{_PREFIX}*/{_OWNER}"):
        try:
            if owner.lstat().st_uid != os.geteuid():
                continue
            lock_fd = os.open(owner, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError:  # gone meanwhile, or not ours
            continue
        try:
            fcntl.flock(lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:  # its process lives
            os.close(lock_fd)
            continue
        ended = _end_processes(owner.parent)
        shutil.rmtree(owner.parent, ignore_errors=True)
        os.close(lock_fd)
        log.warning(
            "%s was left by a service that was killed: removed%s",
            owner.parent,
            f", and {ended} of its processes ended" if ended else "",
        )


def _end_processes(folder: Path) -> int:
    """Kills this user's Ray processes whose files are in `folder`, and says how many there were."""
    import psutil

    ended = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.uids().effective == os.geteuid() and _is_rays(process, f"{folder}/"):
                process.kill()
                ended.append(process)
    psutil.wait_procs(ended, timeout=1)
    return len(ended)


def _is_rays(process: "psutil.Process", below: str) -> bool:
    """Whether it is a process of the Ray in a folder. Those that rename themselves show no arguments, but have their
    log open there. So may a pager, which is none of Ray's."""
    arguments = process.cmdline()
    if not arguments:
        return False
    program = Path(arguments[0]).name
    if program in _RAY_PROGRAMS or program.startswith("python"):
        return any(below in argument for argument in arguments)
    return arguments[0].startswith("ray::") and any(
        file.path.startswith(below) for file in process.open_files()
    )
