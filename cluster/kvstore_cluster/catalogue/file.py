"""A catalogue in one small file."""

import logging
import os
import threading
from contextlib import suppress
from pathlib import Path

from kvstore_cluster.background import BackgroundLoop
from kvstore_cluster.catalogue.base import ClusterState
from kvstore_cluster.catalogue.document import MAX_DOCUMENT_BYTES, read_document, unsound, write_document
from kvstore_cluster.durable import lock_folder, relock_folder, write_durably
from kvstore_cluster.encryption import FileCipher, KeySource, key_name_of
from kvstore_cluster.encryption.files import ADDED_BYTES
from kvstore_codec.errors import CatalogueError, ChunkFormatError

log = logging.getLogger(__name__)

_LOCK_NAME = "catalogue.lock"
_WATCH_PERIOD_S = 1.0


class FileCatalogue:
    """Stores a ClusterState in `folder`/catalogue.json. Writes a temporary file, syncs it and renames it, so that a
    crash leaves either the old state or the new one. Locks the folder for one process, and creates it when missing.

    Writes a removed file or folder again within about a second.

    With `keys`, the file is encrypted with the first of them.

    Raises CatalogueError when the folder cannot be written, is in use, or holds a damaged file. A damaged catalogue is
    never treated as an empty one.
    """

    def __init__(self, folder: Path, keys: KeySource | None = None) -> None:
        self._path = folder / "catalogue.json"
        self._cipher = FileCipher(keys)
        try:
            self._lock_fd = lock_folder(folder, _LOCK_NAME)
        except BlockingIOError as error:
            raise _in_use(folder) from error
        except OSError as error:
            raise _unwritable(folder, error) from error
        self._writing = threading.Lock()
        self._kept: str | None = None
        """Decrypted content of the file. None when there is no file yet."""
        self._key_name = ""
        self._reported = ""
        self._watching = BackgroundLoop("kvstore-catalogue-file", self._watch, period_s=_WATCH_PERIOD_S)
        self._watching.start()

    def close(self) -> None:
        """Releases the folder for another coordinator. Later saves raise CatalogueError."""
        self._watching.stop()
        with self._writing:
            os.close(self._lock_fd)

    def load(self) -> ClusterState:
        """The last saved state, or an empty one when none was saved. Raises CatalogueError, and EncryptionKeyError when
        its key is not given."""
        try:
            with self._path.open("rb") as file:
                data = file.read(MAX_DOCUMENT_BYTES + ADDED_BYTES + 1)
            text = self._cipher.decrypt(self._path, data).decode()
        except FileNotFoundError:
            return ClusterState()
        except (OSError, UnicodeDecodeError, ChunkFormatError) as error:
            raise unsound(str(self._path), str(error)) from error
        state = read_document(text, str(self._path))
        self._kept, self._key_name = text, key_name_of(data)
        return state

    def save(self, state: ClusterState) -> None:
        """Saves the state, so that it survives a power loss. May block. Raises CatalogueError, and then keeps the old
        state."""
        text = write_document(state)
        with self._writing:
            self._write(text)
            self._kept = text

    def _write(self, text: str) -> None:
        """Writes the file durably. Raises CatalogueError."""
        folder = self._path.parent
        if (
            self._watching.stopping.is_set()
        ):  # the closed descriptor of the lock may be in use for another file
            raise CatalogueError(f"the catalogue in {folder} was closed; nothing is written to it any more")
        aside = self._path.with_suffix(".tmp")
        try:
            self._lock_fd = relock_folder(folder, _LOCK_NAME, self._lock_fd)
        except (
            BlockingIOError
        ) as error:  # the folder was removed, and another coordinator has locked a new one
            raise _in_use(folder) from error
        except OSError as error:
            raise _unwritable(folder, error) from error
        try:
            key_name = self._cipher.key_name
            write_durably(self._path, self._cipher.encrypt(self._path, text.encode()), aside)
            if key_name != self._key_name:
                log.info("%s is encrypted with key %s", self._path, key_name)
            self._key_name = key_name
        except OSError as error:
            with suppress(OSError):
                aside.unlink()
            raise _unwritable(folder, error) from error

    def _watch(self) -> None:
        """Writes the file again if it was removed or its key is no longer the first."""
        try:
            with self._writing:
                if self._kept is None:
                    return
                is_there = self._path.exists()
                if is_there and self._key_name == self._cipher.key_name:
                    return
                self._write(self._kept)
        except (CatalogueError, OSError) as error:
            if str(error) != self._reported:
                log.warning("%s cannot be written again: %s", self._path, error)
            self._reported = str(error)
        else:
            if not is_there:
                log.error("%s was removed while in use, and was written again", self._path)
            self._reported = ""


def _in_use(folder: Path) -> CatalogueError:
    return CatalogueError(
        f"the data folder {folder} is in use by another coordinator; stop it, or choose another --data-dir"
    )


def _unwritable(folder: Path, error: OSError) -> CatalogueError:
    if folder.is_dir():
        return CatalogueError(
            f"the data folder {folder} cannot be written ({error.strerror}); make it writable or choose another "
            "--data-dir"
        )
    why = "it is a file, not a folder" if folder.is_file() else f"it cannot be created: {error.strerror}"
    return CatalogueError(f"the data folder {folder} cannot be written ({why}); choose another --data-dir")
