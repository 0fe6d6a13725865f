"""Processes of ours end with the process that started them, also when that is killed."""

import ctypes
import signal

_PR_SET_PDEATHSIG = 1
# Loaded ahead: between fork and exec nothing may be imported.
_libc = ctypes.CDLL(None)


def end_with_parent(number: signal.Signals = signal.SIGTERM) -> None:
    """Called in a new process: the kernel sends it `number` when the thread that started it has ended."""
    _libc.prctl(_PR_SET_PDEATHSIG, int(number))
