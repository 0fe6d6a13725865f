"""The folder of a store: the names in it, and whose it is."""

import os
import re
from pathlib import Path
from typing import Protocol

from kvstore_cluster.disk.file import SegmentFile, disk_error
from kvstore_cluster.durable import lock_folder, relock_folder, sync_folder
from kvstore_codec.errors import FolderInUseError

_LOCK_NAME = "store.lock"
_NAME = re.compile(r"segment-(\d{8,})\.(kvs|index)")


class OpenFile(Protocol):
    def __call__(self, path: Path, *, create: bool, direct: bool) -> SegmentFile: ...


class StoreFolder:
    """Made when missing; belongs to one process until it is closed. Raises FolderInUseError when it is taken, and
    DiskError when it cannot be written."""

    def __init__(self, path: Path, *, direct: bool, open_file: OpenFile) -> None:
        self.path = path
        self._open_file = open_file
        try:
            self._lock_fd = lock_folder(path, _LOCK_NAME)
        except BlockingIOError as error:
            raise FolderInUseError(
                f"{path} is in use by another process; stop it or choose another data folder"
            ) from error
        except OSError as error:
            raise disk_error(error, f"opening the disk tier in {path}") from error
        self.direct = direct and self._offers_direct()

    def restore(self) -> None:
        """Makes the folder, and takes it, again when it was removed. Raises OSError, BlockingIOError when it belongs to
        another process by now."""
        try:
            self._lock_fd = relock_folder(self.path, _LOCK_NAME, self._lock_fd)
        except BlockingIOError as error:
            raise BlockingIOError(
                error.errno, "it was removed, and another process uses one of the same name by now"
            ) from error

    def names(self, number: int, file: SegmentFile) -> bool:
        """Whether the segment's file is still the one of that name in the folder; else a restart would not find it."""
        return file.is_at(self.segment(number))

    def segment(self, number: int) -> Path:
        return self.path / f"segment-{number:08d}.kvs"

    def open_segment(self, number: int, *, create: bool) -> SegmentFile:
        """Raises OSError."""
        return self._open_file(self.segment(number), create=create, direct=self.direct)

    def index(self, number: int) -> Path:
        return self.path / f"segment-{number:08d}.index"

    def numbers(self) -> list[int]:
        """Of the segments that are there, rising. Indexes without a segment are removed. Raises OSError."""
        found: dict[str, set[int]] = {"kvs": set(), "index": set()}
        for path in self.path.iterdir():
            if match := _NAME.fullmatch(path.name):
                found[match[2]].add(int(match[1]))
        for number in found["index"] - found["kvs"]:
            self.index(number).unlink()
        return sorted(found["kvs"])

    def remove(self, number: int) -> None:
        """Removes a segment for good: it does not come back after a power loss. Raises OSError."""
        self.index(number).unlink(missing_ok=True)
        self.segment(number).unlink(missing_ok=True)
        sync_folder(self.path)

    def set_aside(self, number: int) -> Path:
        """Takes a segment that cannot be read at all out of the store, and says where it is. Raises OSError."""
        aside = self.segment(number).with_suffix(".damaged")
        self.segment(number).replace(aside)
        return aside

    def free_bytes(self) -> int | None:
        """What the disk has left; None where the file system does not say. Raises OSError."""
        space = os.statvfs(self.path)
        return space.f_bavail * space.f_frsize if space.f_blocks else None

    def close(self) -> None:
        os.close(self._lock_fd)

    def _offers_direct(self) -> bool:
        """Some file systems, such as those in memory, have no O_DIRECT."""
        try:
            os.close(os.open(self.path / _LOCK_NAME, os.O_RDONLY | os.O_DIRECT))
        except OSError:
            return False
        return True
