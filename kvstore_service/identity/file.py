"""The file of credentials: read again when it changes, and changed by one process at a time."""

import fcntl
import logging
import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from kvstore_client.file_stamp import stamp_of
from kvstore_cluster.background import BackgroundLoop
from kvstore_cluster.durable import rename_durably
from kvstore_codec.errors import ConfigurationError
from kvstore_service.identity.credential import Credential
from kvstore_service.identity.credentials import Credentials
from kvstore_service.identity.document import MAX_DOCUMENT_BYTES, read_document, write_document

log = logging.getLogger(__name__)

CHECK_PERIOD_S = 0.5
"""A change of the file takes effect within this time."""


class CredentialFile:
    """The credentials in a file. Thread-safe. Between `start` and `stop` a thread looks for changes of the file; so
    does `refresh`. A file that has become unreadable or wrong is read again until it is right; each reason is logged
    once, and the last good content stays in effect. Raises ConfigurationError when it is wrong at first."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stamp = stamp_of(path)
        self.current = read_credentials(path)
        """The credentials in effect."""
        self.changes = 0
        """Number of times that the content in effect has changed."""
        self._logged = ""
        self._watching = BackgroundLoop("kvstore-credentials", self.refresh, period_s=CHECK_PERIOD_S)

    def start(self) -> None:
        self._watching.start()

    def stop(self) -> None:
        self._watching.stop()

    def refresh(self) -> None:
        """Reads the file again if it has changed. Not called by two threads at once."""
        stamp = stamp_of(self._path)
        if stamp == self._stamp:
            return
        try:
            self.current = read_credentials(self._path)
        except ConfigurationError as error:
            if str(error) != self._logged:
                self._logged = str(error)
                log.error("%s. The credentials that were read before stay in effect", error)  # noqa: TRY400
        else:
            self._stamp, self._logged = stamp, ""
            self.changes += 1
            log.info("%d credentials are in effect from %s", len(self.current), self._path)


def read_credentials(path: Path) -> Credentials:
    """The credentials in a file. Raises ConfigurationError."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_DOCUMENT_BYTES + 1)
    except OSError as error:
        raise _unusable(path, f"{error.strerror}; `kvstore credentials add` makes it") from error
    if len(data) > MAX_DOCUMENT_BYTES:
        raise _unusable(path, f"it has more than {MAX_DOCUMENT_BYTES} bytes")
    try:
        return Credentials(read_document(data.decode()))
    except UnicodeDecodeError:
        raise _unusable(path, "it is not text in UTF-8") from None
    except ConfigurationError as error:
        raise _unusable(path, str(error)) from None


@contextmanager
def changing(path: Path) -> Iterator[list[Credential]]:
    """Yields the credentials of a file, which is made when it is missing, and writes back what the block leaves in the
    list. Other processes that change this file wait meanwhile. When the block raises, the file stays as it was, or
    empty of credentials if it was missing. A new file may be read by its owner only; an existing one keeps its owner
    and mode, so that the service goes on reading it. Raises ConfigurationError."""
    try:
        path = path.resolve()
        path.parent.mkdir(parents=True, exist_ok=True)
        locked_fd = _lock(path)
    except OSError as error:
        raise _unusable(path, str(error.strerror)) from error
    try:
        credentials = list(read_credentials(path))
        yield credentials
        _replace(path, write_document(Credentials(credentials)))
    finally:
        os.close(locked_fd)


def _lock(path: Path) -> int:
    """Descriptor of the locked file, which is made when it is missing. Only who may read the file can lock it, unlike
    its folder. Blocks. Raises OSError."""
    while True:
        try:
            locked_fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            _make(path)
            continue
        fcntl.flock(locked_fd, fcntl.LOCK_EX)
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(locked_fd), path.stat()):
                return locked_fd
        os.close(locked_fd)  # another process has replaced the file meanwhile


def _make(path: Path) -> None:
    """Makes a file without credentials, unless another process makes one. Raises OSError."""
    with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=f".{path.name}.", encoding="utf-8") as new:
        new.write(write_document(()))
        new.flush()
        with suppress(FileExistsError):
            path.hardlink_to(new.name)


def _replace(path: Path, text: str) -> None:
    aside = path.with_name(f".{path.name}.unfinished")
    try:
        with suppress(FileNotFoundError):
            aside.unlink()
        with open(aside, "x", encoding="utf-8", opener=_for_owner) as file:
            with suppress(FileNotFoundError):
                found = path.stat()
                if (found.st_uid, found.st_gid) != (os.geteuid(), os.getegid()):
                    os.fchown(file.fileno(), found.st_uid, found.st_gid)
                os.fchmod(file.fileno(), stat.S_IMODE(found.st_mode))
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        rename_durably(aside, path)
    except OSError as error:
        raise _unusable(path, str(error.strerror)) from error


def _for_owner(path: str, flags: int) -> int:
    """Opens a file that only its owner may read."""
    return os.open(path, flags, 0o600)


def _unusable(path: Path, reason: str) -> ConfigurationError:
    return ConfigurationError(f"cannot use the credentials in {path}: {reason}")
