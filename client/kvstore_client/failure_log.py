"""Failures that the engine never sees, told to people: a warning per cause and minute."""

import logging
import math
import threading
import time
from collections.abc import Callable

log = logging.getLogger(__name__)

INTERVAL_S = 60.0
_MOST_CAUSES = 256


class FailureLog:
    """Writes one WARNING per cause and minute, however often it happens. Thread-safe.

    Remembers the 256 causes that were logged last; one that is forgotten is logged again.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._causes: dict[str, tuple[float, int]] = {}
        """When each was logged, and how often it has happened since, the latest logged last."""

    def warn(self, cause: str, message: str, error: Exception | None = None) -> None:
        """With the traceback of `error`, if one is given."""
        now_s = self._clock()
        with self._lock:
            logged_at_s, since = self._causes.get(cause, (-math.inf, 0))
            if now_s - logged_at_s < INTERVAL_S:
                self._causes[cause] = logged_at_s, since + 1
                return
            self._causes.pop(cause, None)
            self._causes[cause] = now_s, 0
            if len(self._causes) > _MOST_CAUSES:
                del self._causes[next(iter(self._causes))]
        log.warning(
            "%s%s",
            message,
            f" ({since} more times since the last such line)" if since else "",
            exc_info=error,
        )
