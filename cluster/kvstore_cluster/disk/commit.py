"""Group commit: threads that want their writes synced at the same time share one fdatasync."""

import threading

from kvstore_cluster.disk.file import SegmentFile, disk_error
from kvstore_codec.errors import DiskError, DiskFailedError


class GroupCommit:
    """Of one file; thread-safe. After a sync failed nothing of the file is ever called synced again: the kernel may
    have dropped what it could not write, and would report the next sync as a success."""

    def __init__(self, file: SegmentFile, name: str) -> None:
        self._file = file
        self._name = name
        self._changed = threading.Condition()
        self._unsynced = False  # something was written after the newest sync began
        self._begun = 0
        self._ended = 0
        self.failure: DiskError | None = None

    @property
    def unsynced(self) -> bool:
        """Whether something that was written has not been synced."""
        with self._changed:
            return self._unsynced or self._ended < self._begun

    def wrote(self) -> None:
        """To be called after each write."""
        with self._changed:
            self._unsynced = True

    def fail(self, failure: DiskError) -> None:
        """Nothing may be synced any more."""
        with self._changed:
            self.failure = self.failure or failure
            self._changed.notify_all()

    def sync(self) -> None:
        """Returns once what was written before the call would survive a power loss. Raises DiskError."""
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
        """Syncs for everybody who waits, with the lock given up meanwhile."""
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
