"""The embedded catalogue: one small file."""

import fcntl
import os
from contextlib import suppress
from pathlib import Path

from kvstore_cluster.catalogue.base import ClusterState
from kvstore_cluster.catalogue.document import read_document, unsound, write_document
from kvstore_cluster.durable import rename_durably
from kvstore_codec.errors import CatalogueError


class FileCatalogue:
    """Keeps a ClusterState in `folder`/catalogue.json: written aside, synced and renamed, so that a crash leaves
    the old state or the new one. One process at a time; the folder is made when missing.

    Raises CatalogueError when the folder cannot be written, is in use, or holds a file that is not sound: a
    damaged catalogue is never taken for an empty one.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / "catalogue.json"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._lock_fd = os.open(folder / "catalogue.lock", os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise _unwritable(folder, error) from error
        try:
            fcntl.flock(self._lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._lock_fd)
            raise CatalogueError(
                f"the data folder {folder} is in use by another coordinator; stop it, or choose another --data-dir"
            ) from error

    def close(self) -> None:
        """Lets another coordinator have the folder."""
        os.close(self._lock_fd)

    def load(self) -> ClusterState:
        """The state last saved; an empty one when there never was any. Raises CatalogueError."""
        try:
            text = self._path.read_text(encoding="utf-8")
        except FileNotFoundError:
            return ClusterState()
        except (OSError, UnicodeDecodeError) as error:
            raise unsound(str(self._path), str(error)) from error
        return read_document(text, str(self._path))

    def save(self, state: ClusterState) -> None:
        """Returns once the state would survive a power loss. Raises CatalogueError; the old state then stays."""
        aside = self._path.with_suffix(".tmp")
        try:
            with aside.open("w", encoding="utf-8") as file:
                file.write(write_document(state))
                file.flush()
                os.fsync(file.fileno())
            rename_durably(aside, self._path)
        except OSError as error:
            with suppress(OSError):
                aside.unlink()
            raise _unwritable(self._path.parent, error) from error


def _unwritable(folder: Path, error: OSError) -> CatalogueError:
    return CatalogueError(
        f"the data folder {folder} cannot be written ({error.strerror}); make it writable or choose another --data-dir"
    )
