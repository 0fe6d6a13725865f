"""What is made of files, and made again when they change."""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Generic, TypeVar

from kvstore_client.file_stamp import stamp_of
from kvstore_codec.errors import ConfigurationError

log = logging.getLogger(__name__)

CHECK_PERIOD_S = 1.0
"""A change of a file takes effect within this time."""
_REPLACED_WITHIN_S = 0.2
"""Longest time between the replacements of files that belong together, such as a key and its certificate."""

Loaded = TypeVar("Loaded")


class ReloadedFiles(Generic[Loaded]):
    """What `load` makes of `files`, of which None are left out. Thread-safe. Files that become unusable are logged
    once, and what was made of their last good content stays in use. Raises ConfigurationError, as `load` does, when
    they are unusable at first."""

    def __init__(
        self,
        files: Sequence[Path | None],
        load: Callable[[], Loaded],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._files, self._load, self._clock = files, load, clock
        self._has_files = any(path is not None for path in files)
        self._stamp = stamp_of(*files)
        self._loaded = self._loaded_first()
        self._checked_s = clock()
        self._checking = threading.Lock()
        self._changes = 0

    @property
    def current(self) -> Loaded:
        """It as it is now."""
        if (
            self._has_files
            and self._clock() - self._checked_s >= CHECK_PERIOD_S
            and self._checking.acquire(blocking=False)
        ):
            try:
                self._check()
            finally:
                self._checked_s = self._clock()
                self._checking.release()
        return self._loaded

    @property
    def changes(self) -> int:
        """Number of times that it was made again."""
        _ = self.current
        return self._changes

    def _loaded_first(self) -> Loaded:
        """Loads files that may just be replaced: those that do not belong together are read again once they change."""
        while True:
            try:
                return self._load()
            except ConfigurationError:
                deadline_s = time.monotonic() + _REPLACED_WITHIN_S
                while (stamp := stamp_of(*self._files)) == self._stamp:
                    if time.monotonic() > deadline_s:
                        raise
                    time.sleep(0.01)
                self._stamp = stamp

    def _check(self) -> None:
        stamp = stamp_of(*self._files)
        if stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            self._loaded = self._load()
        except ConfigurationError as error:
            log.warning("%s. What was read before stays in use", error)
        else:
            self._changes += 1
