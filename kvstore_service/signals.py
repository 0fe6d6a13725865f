"""Signals that ask a process to stop: SIGTERM, SIGINT (Ctrl-C) and SIGHUP (a closed terminal).

The first signal raises an exception, so that the process releases its resources in order. Later signals have no effect.
A signal that was ignored when the process started, as `nohup` does with SIGHUP, stays ignored. SIGQUIT is not handled:
it ends the process at once.
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
    """Raised in the main thread by the first signal. It is a KeyboardInterrupt because Ray's calls swallow every other
    exception that a signal handler raises."""


class StopSignals:
    """Signal handlers that raise Stopped. `received` is the first signal, or None before it."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None

    def install(self) -> None:
        """Installs the handlers. Call it in the main thread."""
        for number in heeded():
            signal.signal(number, self._stop)

    def _stop(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002 (the signature of a handler)
        if self.received is None:
            self.received = signal.Signals(number)
            raise Stopped


def end_by(number: signal.Signals) -> NoReturn:
    """Ends the process with a signal, so that its parent sees the reason. The first process of a container, which no
    signal ends by default, exits with status 128 + `number`."""
    atexit._run_exitfuncs()  # for example multiprocessing releases its semaphores there
    sys.stdout.flush()
    sys.stderr.flush()
    signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [number])
    os.kill(os.getpid(), number)
    sys.exit(128 + number)


def heeded() -> set[signal.Signals]:
    """Signals that stop this process: SIGTERM, SIGINT and SIGHUP, except ignored ones."""
    return {number for number in _STOPPING if signal.getsignal(number) is not signal.SIG_IGN}


def block() -> set[signal.Signals]:
    """Blocks the stop signals in this thread and in threads that it starts. Returns them for `sigtimedwait`.

    Child processes inherit the blocked signals except SIGTERM. Ctrl-C and a closed terminal send signals to all
    processes of the terminal, and only this process reacts to them.
    """
    global _blocked_here
    numbers = heeded()
    signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    _blocked_here = True
    return numbers


@contextmanager
def deferred() -> Iterator[None]:
    """Defers the stop signals during the block, and then restores their handlers. For the start of a library that
    installs its own handlers."""
    global _blocked_here
    before = _blocked_here
    handlers = {number: signal.getsignal(number) for number in _STOPPING}
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, _STOPPING)
    _blocked_here = True
    taken: int | None = None
    try:
        yield
    except SystemExit as ended:
        # A thread that existed before took the signal, and the library's handler ended this one with its number.
        if ended.code not in handlers:
            raise
        taken = int(ended.code)
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in handlers.items():
                if handler is not None:  # None: not installed from Python, so Python cannot restore it
                    signal.signal(number, handler)
        _blocked_here = before
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    if taken is not None:
        signal.raise_signal(taken)


def _unblock_in_child() -> None:
    if _blocked_here:  # Ray ends its processes with SIGTERM
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])


os.register_at_fork(after_in_child=_unblock_in_child)
