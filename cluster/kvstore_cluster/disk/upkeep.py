"""What the log needs now and then: syncs, seals, a look how much room there is and whether a failed disk is well."""

import logging
import threading

from kvstore_cluster.disk.log import SegmentLog
from kvstore_codec.errors import DiskError

log = logging.getLogger(__name__)


class Upkeep:
    """A thread, started by the first `start`, that works every `period_s` of the monotonic clock or when woken."""

    def __init__(self, period_s: float) -> None:
        self._period_s = period_s
        self._due = threading.Event()
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None
        self._starting = threading.Lock()

    @property
    def stopping(self) -> threading.Event:
        return self._stopping

    def start(self, segments: SegmentLog) -> None:
        """Does nothing when it runs already."""
        if self._thread is None:
            with self._starting:
                if self._thread is None:
                    self._thread = threading.Thread(
                        target=self._run, args=(segments,), name="kvstore-disk", daemon=True
                    )
                    self._thread.start()

    def wake(self) -> None:
        self._due.set()

    def stop(self) -> None:
        """Returns once the thread has ended."""
        self._stopping.set()
        self._due.set()
        if self._thread is not None:
            self._thread.join()

    def _run(self, segments: SegmentLog) -> None:
        reported = ""
        tasks = (
            segments.give_up_removed,
            segments.revive,
            segments.measure,
            segments.seal_closed,
            segments.sync_written,
        )
        while not self._stopping.is_set():
            self._due.wait(self._period_s)
            self._due.clear()
            for task in tasks:
                try:
                    task()
                except DiskError as error:
                    if str(error) != reported:  # once, and not every period
                        log.warning("%s", error)
                    reported = str(error)
