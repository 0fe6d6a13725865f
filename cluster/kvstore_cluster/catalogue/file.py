"""The embedded catalogue: one small file."""

import logging
import os
import threading
from contextlib import suppress
from pathlib import Path

from kvstore_cluster.background import BackgroundLoop
from kvstore_cluster.catalogue.base import ClusterState
from kvstore_cluster.catalogue.document import MAX_DOCUMENT_BYTES, read_document, unsound, write_document
from kvstore_cluster.durable import lock_folder, relock_folder, rename_durably
from kvstore_codec.errors import CatalogueError

log = logging.getLogger(__name__)

_LOCK_NAME = "catalogue.lock"
_WATCH_PERIOD_S = 1.0


class FileCatalogue:
    """Keeps a ClusterState in `folder`/catalogue.json: written aside, synced and renamed, so that a crash leaves
    the old state or the new one. One process at a time; the folder is made when missing.

    A file or folder that somebody removes is written again within about a second.

    Raises CatalogueError when the folder cannot be written, is in use, or holds a file that is not sound: a
    damaged catalogue is never taken for an empty one.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / "catalogue.json"
        try:
            self._lock_fd = lock_folder(folder, _LOCK_NAME)
        except BlockingIOError as error:
            raise _in_use(folder) from error
        except OSError as error:
            raise _unwritable(folder, error) from error
        self._writing = threading.Lock()
        self._kept: str | None = None
        """What the file holds; None when there is none yet."""
        self._reported = ""
        self._watching = BackgroundLoop("kvstore-catalogue-file", self._watch)
        self._watching.start()

    def close(self) -> None:
        """Lets another coordinator have the folder. What is saved afterwards raises CatalogueError."""
        self._watching.stop()
        with self._writing:
            os.close(self._lock_fd)

    def load(self) -> ClusterState:
        """The state last saved; an empty one when there never was any. Raises CatalogueError."""
        try:
            with self._path.open(encoding="utf-8") as file:
                text = file.read(MAX_DOCUMENT_BYTES + 1)
        except FileNotFoundError:
            return ClusterState()
        except (OSError, UnicodeDecodeError) as error:
            raise unsound(str(self._path), str(error)) from error
        state = read_document(text, str(self._path))
        self._kept = text
        return state

    def save(self, state: ClusterState) -> None:
        """Returns once the state would survive a power loss. Raises CatalogueError; the old state then stays."""
        text = write_document(state)
        with self._writing:
            self._write(text)
            self._kept = text

    def _write(self, text: str) -> None:
        """Raises CatalogueError."""
        folder = self._path.parent
        if self._watching.stopping.is_set():  # the lock's descriptor may be somebody else's by now
            raise CatalogueError(f"the catalogue in {folder} was closed; nothing is written to it any more")
        aside = self._path.with_suffix(".tmp")
        try:
            self._lock_fd = relock_folder(folder, _LOCK_NAME, self._lock_fd)
        except BlockingIOError as error:  # it was removed, and another coordinator was faster
            raise _in_use(folder) from error
        except OSError as error:
            raise _unwritable(folder, error) from error
        try:
            with aside.open("w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            rename_durably(aside, self._path)
        except OSError as error:
            with suppress(OSError):
                aside.unlink()
            raise _unwritable(folder, error) from error

    def _watch(self) -> None:
        """Waits a period, and writes the file again when it was removed."""
        if self._watching.stopping.wait(_WATCH_PERIOD_S):
            return
        try:
            with self._writing:
                if self._kept is None or self._path.exists():
                    return
                self._write(self._kept)
        except (CatalogueError, OSError) as error:
            if str(error) != self._reported:
                log.warning("%s was removed and cannot be written again: %s", self._path, error)
            self._reported = str(error)
        else:
            log.error("%s was removed while it is in use; it was written again", self._path)
            self._reported = ""


def _in_use(folder: Path) -> CatalogueError:
    return CatalogueError(
        f"the data folder {folder} is in use by another coordinator; stop it, or choose another --data-dir"
    )


def _unwritable(folder: Path, error: OSError) -> CatalogueError:
    return CatalogueError(
        f"the data folder {folder} cannot be written ({error.strerror}); make it writable or choose another --data-dir"
    )
