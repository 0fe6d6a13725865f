"""Log of failures that the engine never sees: one warning per cause and minute."""

import logging
import math
import threading
import time
from collections.abc import Callable

log = logging.getLogger(__name__)

INTERVAL_S = 60.0
_MOST_CAUSES = 256


class FailureLog:
    """Logs one WARNING per cause and minute, however often the cause occurs. Thread-safe.

    Remembers the 256 most recently logged causes; a forgotten one is logged again.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._causes: dict[str, tuple[float, int]] = {}
        """Time of the last line and number of failures since, by cause; the latest logged cause is last."""

    def warn(self, cause: str, message: str, error: Exception | None = None) -> None:
        """Log a failure, with the traceback of `error` if given."""
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
