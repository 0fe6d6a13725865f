"""A temporary folder that lives as long as its process, for files such as Ray's. Leftover folders are removed.

The process that holds the lock on the file `owner` in a folder owns that folder. The kernel releases the lock when the
process ends, however it ends. A folder whose lock is free is therefore a leftover of a killed process. A folder is only
removed if its name, type, mode and user are those of a folder made by this module, and its `owner` file says so.
"""

import fcntl
import logging
import os
import re
import shutil
import stat
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
_NAME = re.compile(_PREFIX + "[a-z0-9_]{8}")  # as mkdtemp makes it
_OWNER = "owner"
_OWNER_LINE = b"scratch folder of kvstore process "
_LONGEST_OWNER = len(_OWNER_LINE) + 20
# Child processes inherit this variable, which names the folder of the process that started them.
_VARIABLE = "KVSTORE_SCRATCH_FOLDER"
# The path of a Unix socket has at most 107 bytes, and Ray's sockets have long paths below the folder.
_DEEPEST = f"/{_PREFIX}12345678/ray/session_2026-01-31_12-00-00_123456_4194304/sockets/plasma_store"
LONGEST_PARENT_BYTES = 107 - len(_DEEPEST)
# Ray writes half a MiB of logs during its start.
_PROBE_BYTES = 1 << 20
_PARENT_VARIABLES = ("TMPDIR", "TEMP", "TMP")
_DEFAULTS = ("/tmp", "/var/tmp")  # noqa: S108 (checked before use)
_RAY_PROGRAMS = ("gcs_server", "raylet")


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """A new folder with a short path, removed when the block ends. First removes folders that killed processes of this
    user have left, and kills Ray processes that still use them. Raises StartupError if no folder can be made."""
    parent = _parent()
    _clear_leftovers(parent)
    try:
        folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent))
    except OSError as error:
        raise StartupError(f"cannot make a temporary folder in {parent}: {error.strerror}") from error
    lock_fd = -1
    try:
        lock_fd = _own(folder)
        with _named_in_environment(folder):
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if lock_fd >= 0:
            os.close(lock_fd)


@contextmanager
def _named_in_environment(folder: Path) -> Iterator[None]:
    before = os.environ.get(_VARIABLE)
    os.environ[_VARIABLE] = str(folder)
    try:
        yield
    finally:
        del os.environ[_VARIABLE]
        if before is not None:
            os.environ[_VARIABLE] = before


def _parent() -> Path:
    """The first usable folder among those of TMPDIR, TEMP, TMP and the system's. Raises StartupError."""
    named = [(f"{name}=", os.environ[name]) for name in _PARENT_VARIABLES if os.environ.get(name)]
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
    """The reason why Ray cannot use the folder `path`, or None."""
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
    """Makes the `owner` file and returns its locked descriptor. The file gets its name after it is locked, so that a
    process that looks for leftovers never gets the lock first."""
    unseen = folder / f".{_OWNER}"
    lock_fd = os.open(unseen, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    fcntl.flock(lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.write(lock_fd, b"%s%d\n" % (_OWNER_LINE, os.getpid()))
    unseen.rename(folder / _OWNER)
    return lock_fd


def _clear_leftovers(parent: Path) -> None:
    folders: list[Path] = []
    with suppress(OSError):  # the parent may be writable but not readable
        folders = [folder for folder in parent.iterdir() if _NAME.fullmatch(folder.name)]
    for folder in folders:
        lock_fd = _lock_leftover(folder)
        if lock_fd is None:
            continue
        ended = _end_processes(folder)
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock_fd)
        what = "some files could not be removed" if folder.exists() else "removed"
        log.warning(
            "%s was left by a service that was killed: %s%s",
            folder,
            what,
            f", and {ended} of its processes ended" if ended else "",
        )


def _lock_leftover(folder: Path) -> int | None:
    """Locked descriptor of the `owner` file of a folder that a killed service of this user has left. None if the
    service is alive, or if the folder is of another kind."""
    try:
        found = folder.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_mode & 0o777 != 0o700 or found.st_uid != os.geteuid():
            return None
        lock_fd = os.open(folder / _OWNER, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None
    with suppress(OSError):  # the lock is taken
        if stat.S_ISREG(os.fstat(lock_fd).st_mode) and _is_owner_line(os.read(lock_fd, _LONGEST_OWNER)):
            fcntl.flock(lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return lock_fd
    os.close(lock_fd)
    return None


def _is_owner_line(line: bytes) -> bool:
    return line.startswith(_OWNER_LINE) and line.endswith(b"\n") and line[len(_OWNER_LINE) : -1].isdigit()


def _end_processes(folder: Path) -> int:
    """Kills the Ray processes that the folder's owner, a service of this user, has started. Returns their number."""
    import psutil

    ended = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.uids().effective == os.geteuid() and _is_ray_process(process, folder):
                process.kill()
                ended.append(process)
    psutil.wait_procs(ended, timeout=1)
    return len(ended)


def _is_ray_process(process: "psutil.Process", folder: Path) -> bool:
    """Whether `process` belongs to the Ray session in the folder, and the folder's owner has started it.

    The environment and the arguments show this. Ray processes that rename themselves overwrite both, but have their log
    open in the folder. Other processes, such as a pager, may have that log open too, so the name must begin with
    `ray::`."""
    arguments = process.cmdline()
    if not arguments:
        return False
    session = f"{folder}/ray/session_"
    if arguments[0].startswith("ray::"):
        return any(file.path.startswith(session) for file in process.open_files())
    program = Path(arguments[0]).name
    return (
        (program in _RAY_PROGRAMS or program.startswith("python"))
        and any(session in argument for argument in arguments)
        and process.environ().get(_VARIABLE) == str(folder)
    )
