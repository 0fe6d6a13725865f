"""Signals that ask a process to stop: SIGTERM, Ctrl-C, a closed terminal.

The first one unwinds the process, so that everything it began is ended in order; those after it change nothing. One
that was ignored when the process started, as `nohup` does with SIGHUP, stays ignored. SIGQUIT is left as it is: it
ends the process at once.
"""

import atexit
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

_STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)

_blocked_here = False


class Stopped(KeyboardInterrupt):
    """Raised in the main thread by the first signal. A KeyboardInterrupt, because Ray's calls swallow whatever else a
    signal handler raises."""


class StopSignals:
    """Handlers that raise Stopped. `received` is the signal that did, None until then."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None

    def install(self) -> None:
        """Main thread only."""
        for number in heeded():
            signal.signal(number, self._stop)

    def _stop(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002 (the signature of a handler)
        if self.received is None:
            self.received = signal.Signals(number)
            raise Stopped


def end_by(number: signal.Signals) -> NoReturn:
    """Ends the process by a signal, so that its parent sees why it ended. As the first process of a container, which no
    signal ends by default, it exits with 128 and the number."""
    atexit._run_exitfuncs()  # such as multiprocessing's, which gives its semaphores back
    sys.stdout.flush()
    sys.stderr.flush()
    signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [number])
    os.kill(os.getpid(), number)
    sys.exit(128 + number)


def heeded() -> set[signal.Signals]:
    """Signals that stop this process: all but those it ignores."""
    return {number for number in _STOPPING if signal.getsignal(number) is not signal.SIG_IGN}


def block() -> set[signal.Signals]:
    """Keeps the signals pending, in this thread and those that it starts, and returns them for `sigtimedwait`.

    Processes that are started from now on inherit it but for SIGTERM: a closed terminal or Ctrl-C, which reach every
    process of it, are for this one alone to heed.
    """
    global _blocked_here
    numbers = heeded()
    signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    _blocked_here = True
    return numbers


@contextmanager
def deferred() -> Iterator[None]:
    """Defers the signals while a library starts that puts handlers of its own in place, and then restores ours."""
    global _blocked_here
    before = _blocked_here
    handlers = {number: signal.getsignal(number) for number in _STOPPING}
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, _STOPPING)
    _blocked_here = True
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in handlers.items():
                if (
                    handler is not None
                ):  # else it was not put in place from Python, and is not ours to restore
                    signal.signal(number, handler)
        _blocked_here = before
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _unblock_in_child() -> None:
    if _blocked_here:  # SIGTERM is how Ray ends its processes
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])


os.register_at_fork(after_in_child=_unblock_in_child)
