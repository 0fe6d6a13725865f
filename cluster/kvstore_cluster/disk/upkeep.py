"""Periodic upkeep of the log: syncs, seals, measures free space, and tests whether a failed disk works again."""

import logging
import threading

from kvstore_cluster.background import BackgroundLoop
from kvstore_cluster.disk.log import SegmentLog
from kvstore_codec.errors import DiskError

log = logging.getLogger(__name__)


class Upkeep:
    """A background thread that runs the upkeep tasks every `period_s`, or sooner after `wake`."""

    def __init__(self, period_s: float) -> None:
        self._period_s = period_s
        self._due = threading.Event()
        self._reported = ""
        self._loop = BackgroundLoop("kvstore-disk", self._work, wake=self.wake, longest_pause_s=period_s)
        self._segments: SegmentLog | None = None
        self._starting = threading.Lock()

    @property
    def stopping(self) -> threading.Event:
        return self._loop.stopping

    def start(self, segments: SegmentLog) -> None:
        """Starts the thread. Does nothing when it is running."""
        if self._segments is None:
            with self._starting:
                if self._segments is None:
                    self._segments = segments
                    self._loop.start()

    def wake(self) -> None:
        self._due.set()

    def stop(self) -> None:
        """Stops the thread and waits until it has ended."""
        self._loop.stop()

    def _work(self) -> None:
        segments, mistake = self._segments, None
        if segments is None:
            return
        self._due.wait(self._period_s)
        self._due.clear()
        for task in (
            segments.give_up_removed,
            segments.revive,
            segments.measure,
            segments.seal_closed,
            segments.sync_written,
        ):
            try:
                task()
            except DiskError as error:
                if str(error) != self._reported:  # log an error once, not every period
                    log.warning("%s", error)
                self._reported = str(error)
            except Exception as error:  # a bug in one task must not prevent the others
                mistake = mistake or error
        if mistake is not None:
            raise mistake
