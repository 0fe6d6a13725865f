"""Group commit: threads that want their writes synced at the same time share one fdatasync."""

import threading

from kvstore_cluster.disk.file import SegmentFile, disk_error
from kvstore_codec.errors import DiskError, DiskFailedError


class GroupCommit:
    """Group commit of one file. Thread-safe. After a failed sync every later sync of the file fails, too: the kernel
    may have dropped the pages that it could not write, and would report success for the next sync."""

    def __init__(self, file: SegmentFile, name: str) -> None:
        self._file = file
        self._name = name
        self._changed = threading.Condition()
        self._unsynced = False  # whether a write ended after the newest sync began
        self._begun = 0
        self._ended = 0
        self.failure: DiskError | None = None

    @property
    def unsynced(self) -> bool:
        """Whether a write has not been synced yet."""
        with self._changed:
            return self._unsynced or self._ended < self._begun

    def wrote(self) -> None:
        """Records a write. Call it after each write."""
        with self._changed:
            self._unsynced = True

    def fail(self, failure: DiskError) -> None:
        """Makes every later sync raise `failure`."""
        with self._changed:
            self.failure = self.failure or failure
            self._changed.notify_all()

    def sync(self) -> None:
        """Syncs all writes before this call, so that they survive a power loss. May block. Raises DiskError."""
        with self._changed:
            wanted = self._begun + self._unsynced
            while self._ended < wanted:
                if self.failure is not None:
                    raise type(self.failure)(str(self.failure))
                if self._ended < self._begun:
                    self._changed.wait()
                else:
                    self._lead()

    def _lead(self) -> None:
        """Syncs the file for all waiting threads. Releases the lock during the sync."""
        self._begun += 1
        self._unsynced = False
        self._changed.release()
        failure: DiskError | None = DiskFailedError(f"syncing {self._name} was interrupted")
        try:
            self._file.sync()
            failure = None
        except OSError as error:
            failure = disk_error(error, f"syncing {self._name}")
        finally:
            self._changed.acquire()
            self._ended = self._begun if failure is None else self._ended
            self.failure = self.failure or failure
            self._changed.notify_all()
