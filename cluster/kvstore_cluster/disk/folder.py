"""The folder of a segment store: its file names and its lock."""

import os
import re
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from kvstore_cluster.disk.file import SegmentFile, aligned_buffer, disk_error
from kvstore_cluster.disk.record import BLOCK_BYTES
from kvstore_cluster.durable import lock_folder, relock_folder, sync_folder
from kvstore_codec.errors import FolderInUseError

_LOCK_NAME, _TRIAL_NAME = "store.lock", "alignment.tmp"
_ISOLATED_NAME = "tenants-apart"
_SECTOR_BYTES = 512
"""Logical block of most disks; others have 4 KiB."""
_NAME = re.compile(r"segment-(\d{8,})\.(kvs|index)")


class OpenFile(Protocol):
    def __call__(self, path: Path, *, create: bool, direct: bool) -> SegmentFile: ...


class StoreFolder:
    """A folder that is created when missing, and locked for one process until `close`. Raises FolderInUseError when
    another process has locked it, and DiskError when it cannot be written."""

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
        self.isolated = (path / _ISOLATED_NAME).exists()
        """Whether the last store in this folder kept tenants apart."""
        self.direct = direct and self._offers_direct()
        self.read_unit_bytes = self._smallest_read_bytes() if self.direct else BLOCK_BYTES

    def set_isolated(self, *, isolated: bool) -> None:
        """Records durably whether the store keeps tenants apart. May block. Raises OSError."""
        mark = self.path / _ISOLATED_NAME
        if isolated:
            mark.touch()
        else:
            mark.unlink(missing_ok=True)
        sync_folder(self.path)
        self.isolated = isolated

    def restore(self) -> None:
        """Creates and locks the folder again when it was removed. Raises OSError, and BlockingIOError when another
        process has locked a new folder of the same name."""
        try:
            self._lock_fd = relock_folder(self.path, _LOCK_NAME, self._lock_fd)
        except BlockingIOError as error:
            raise BlockingIOError(
                error.errno, "it was removed, and another process has locked a new folder of the same name"
            ) from error
        if self.isolated:
            self.set_isolated(isolated=True)

    def names(self, number: int, file: SegmentFile) -> bool:
        """Whether the segment's file is still in the folder under its name. A restart finds only such files."""
        return file.is_at(self.segment(number))

    def segment(self, number: int) -> Path:
        return self.path / f"segment-{number:08d}.kvs"

    def open_segment(self, number: int, *, create: bool) -> SegmentFile:
        """Raises OSError."""
        file = self._open_file(self.segment(number), create=create, direct=self.direct)
        file.read_unit_bytes = self.read_unit_bytes
        return file

    def index(self, number: int) -> Path:
        return self.path / f"segment-{number:08d}.index"

    def numbers(self) -> list[int]:
        """Numbers of the segments in the folder, ascending. Removes index files without a segment. Raises OSError."""
        found: dict[str, set[int]] = {"kvs": set(), "index": set()}
        for path in self.path.iterdir():
            if match := _NAME.fullmatch(path.name):
                found[match[2]].add(int(match[1]))
        for number in found["index"] - found["kvs"]:
            self.index(number).unlink()
        return sorted(found["kvs"])

    def remove(self, number: int) -> None:
        """Removes a segment durably: a power loss does not restore it. May block. Raises OSError."""
        self.index(number).unlink(missing_ok=True)
        self.segment(number).unlink(missing_ok=True)
        sync_folder(self.path)

    def set_aside(self, number: int) -> Path:
        """Renames a segment that cannot be read, so that recovery ignores it. Returns the new path. Raises OSError."""
        aside = self.segment(number).with_suffix(".damaged")
        self.segment(number).replace(aside)
        return aside

    def free_bytes(self) -> int | None:
        """Free bytes on the disk. None when the file system does not report them. Raises OSError."""
        space = os.statvfs(self.path)
        return space.f_bavail * space.f_frsize if space.f_blocks else None

    def close(self) -> None:
        os.close(self._lock_fd)

    def _offers_direct(self) -> bool:
        """Whether the file system supports O_DIRECT. In-memory file systems, for example, may not."""
        try:
            os.close(os.open(self.path / _LOCK_NAME, os.O_RDONLY | os.O_DIRECT))
        except OSError:
            return False
        return True

    def _smallest_read_bytes(self) -> int:
        """Bytes of the smallest direct read, found by trying: a sector of the device, or a block."""
        trial = self.path / _TRIAL_NAME
        memory = aligned_buffer(BLOCK_BYTES)
        try:
            trial.write_bytes(bytes(2 * BLOCK_BYTES))
            descriptor = os.open(trial, os.O_RDONLY | os.O_DIRECT)
            try:
                os.preadv(descriptor, [memory[_SECTOR_BYTES : 2 * _SECTOR_BYTES]], _SECTOR_BYTES)
            finally:
                os.close(descriptor)
        except OSError:  # it reads whole blocks only, or is full or read-only
            return BLOCK_BYTES
        finally:
            with suppress(OSError):
                trial.unlink(missing_ok=True)
        return _SECTOR_BYTES
