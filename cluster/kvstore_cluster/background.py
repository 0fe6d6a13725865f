"""Background loops that continue after errors, and report whether they fail."""

import logging
import threading
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from kvstore_codec.errors import KVStoreError

log = logging.getLogger(__name__)

_FIRST_PAUSE_S = 0.1
LONGEST_PAUSE_S = 5.0
_MOST_KINDS = 64


@dataclass(frozen=True, slots=True)
class BackgroundHealth:
    """State of all loops in this process: the `errors` since its start, and the last error of each failing loop."""

    errors: int
    failing: dict[str, str]


class BackgroundLoop:
    """Calls `step` repeatedly in its own thread, from `start` until `stop`, each time after `period_s`. Without a
    period the step itself waits until its work is due: on `stopping`, or on a condition that `wake` ends.

    After an error the loop pauses before the next step. The pause doubles with each error in a row, up to
    `longest_pause_s`. Each kind of error is logged at its first occurrence, with its traceback unless it is a
    KVStoreError, and then whenever its count has doubled. `background_health` reports the failing loops.
    """

    def __init__(
        self,
        name: str,
        step: Callable[[], object],
        *,
        period_s: float = 0.0,
        wake: Callable[[], object] = lambda: None,
        longest_pause_s: float = LONGEST_PAUSE_S,
    ) -> None:
        self.name = name
        self.stopping = threading.Event()
        self._step, self._period_s = step, period_s
        self._wake, self._longest_pause_s = wake, longest_pause_s
        self._errors: Counter[str] = Counter()  # by kind of error
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        """Starts the thread. Must be called only once."""
        self._thread.start()

    def stop(self, timeout_s: float | None = None) -> None:
        """Ends the loop after the current step, and waits for it, for at most `timeout_s`. A step that calls `stop` is
        the last one."""
        self.stopping.set()
        self._wake()
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join(timeout_s)

    def _run(self) -> None:
        in_a_row = 0
        try:
            while not self.stopping.wait(self._period_s):
                try:
                    self._step()
                except Exception as error:
                    in_a_row += 1
                    self._failed(error)
                    pause_s = min(_FIRST_PAUSE_S * 2 ** min(in_a_row - 1, 30), self._longest_pause_s)
                    self.stopping.wait(pause_s)
                else:
                    if in_a_row:
                        log.info("%s works again, after %d errors", self.name, in_a_row)
                        _book.works(self)
                    in_a_row = 0
        finally:
            _book.works(self)

    def _failed(self, error: Exception) -> None:
        kind = _kind(error)
        if kind not in self._errors and len(self._errors) >= _MOST_KINDS:
            kind = "others"
        self._errors[kind] += 1
        times = self._errors[kind]
        _book.fails(self, f"{type(error).__name__}: {error}")
        if times == 1:
            is_told = isinstance(error, KVStoreError)  # its message is written for operators
            log.warning(
                "%s failed and will try again: %s", self.name, error, exc_info=None if is_told else error
            )
        elif times & (times - 1) == 0:
            log.warning("%s failed %d times with: %s", self.name, times, error)


def background_health() -> BackgroundHealth:
    return _book.health()


class _Book:
    """The error counts of all loops of this process. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._errors = 0
        self._failing: dict[BackgroundLoop, str] = {}

    def fails(self, loop: BackgroundLoop, error: str) -> None:
        with self._lock:
            self._errors += 1
            self._failing[loop] = error

    def works(self, loop: BackgroundLoop) -> None:
        with self._lock:
            self._failing.pop(loop, None)

    def health(self) -> BackgroundHealth:
        with self._lock:
            return BackgroundHealth(self._errors, {loop.name: error for loop, error in self._failing.items()})


_book = _Book()


def _kind(error: Exception) -> str:
    """The type of an error and the line that raised it. Excludes the message, which may differ each time."""
    frames = traceback.extract_tb(error.__traceback__)
    return (
        f"{type(error).__name__} {frames[-1].filename}:{frames[-1].lineno}"
        if frames
        else type(error).__name__
    )
