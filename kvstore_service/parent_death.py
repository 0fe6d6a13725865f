"""Child processes that end with their parent process, even if the parent is killed."""

import ctypes
import signal

_PR_SET_PDEATHSIG = 1
# Loaded at import: code between fork and exec must not import anything.
_libc = ctypes.CDLL(None)


def end_with_parent(number: signal.Signals = signal.SIGTERM) -> None:
    """Asks the kernel to send signal `number` to this process when the thread that started it ends. Called in the new
    process."""
    _libc.prctl(_PR_SET_PDEATHSIG, int(number))
