"""The coordinator's durable state in one small file (the embedded catalogue)."""

import fcntl
import json
import os
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import xxhash

from kvstore_api.placement import Member
from kvstore_cluster.durable import rename_durably
from kvstore_codec.errors import CatalogueError

_NAME, _VERSION = "kvstore-catalogue", 1
_FORMAT = f"{_NAME} version {_VERSION}"


@dataclass(frozen=True, slots=True)
class NodeRecord:
    """A storage node the cluster knows. `incarnation` grows with every restart of the node; `error` says why a
    node that is not alive is not."""

    member: Member
    incarnation: int
    alive: bool
    error: str = ""


@dataclass(frozen=True, slots=True)
class ClusterState:
    epoch: int = 0
    nodes: tuple[NodeRecord, ...] = ()


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
            raise _unsound(self._path, str(error)) from error
        try:
            document = json.loads(text)
            found = f"{document['format']} version {document['version']}"
            sound = document["checksum"] == _checksum(document["state"])
            state = _parse(document["state"]) if sound and found == _FORMAT else ClusterState()
        except (ValueError, KeyError, TypeError) as error:
            raise _unsound(self._path, repr(error)) from error
        if not sound:
            raise _unsound(self._path, "its checksum does not match")
        if found != _FORMAT:
            raise CatalogueError(f"{self._path} is {found}; this release reads {_FORMAT}")
        return state

    def save(self, state: ClusterState) -> None:
        """Returns once the state would survive a power loss. Raises CatalogueError; the old state then stays."""
        content = asdict(state)
        document = {
            "format": _NAME,
            "version": _VERSION,
            "state": content,
            "checksum": _checksum(content),
        }
        aside = self._path.with_suffix(".tmp")
        try:
            with aside.open("w", encoding="utf-8") as file:
                json.dump(document, file, indent=1)
                file.flush()
                os.fsync(file.fileno())
            rename_durably(aside, self._path)
        except OSError as error:
            with suppress(OSError):
                aside.unlink()
            raise _unwritable(self._path.parent, error) from error


def _checksum(state: dict[str, Any]) -> str:
    return xxhash.xxh3_64_hexdigest(json.dumps(state, sort_keys=True).encode())


def _parse(state: dict[str, Any]) -> ClusterState:
    nodes = tuple(
        NodeRecord(Member(**node["member"]), node["incarnation"], node["alive"], node["error"])
        for node in state["nodes"]
    )
    return ClusterState(state["epoch"], nodes)


def _unwritable(folder: Path, error: OSError) -> CatalogueError:
    return CatalogueError(
        f"the data folder {folder} cannot be written ({error.strerror}); make it writable or choose another --data-dir"
    )


def _unsound(path: Path, reason: str) -> CatalogueError:
    return CatalogueError(
        f"the catalogue {path} is damaged ({reason}); restore it from a copy, or move it away to start a new cluster"
    )
