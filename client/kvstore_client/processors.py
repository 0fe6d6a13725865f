"""Which processors background threads that compute run on."""

import os
from contextlib import suppress
from pathlib import Path

_THREADS_OF_PROCESS = Path("/proc/self/task")


def leave_engines_processor() -> None:
    """Let the calling thread, and those that it starts, run on every processor that a thread of this process may use.

    On a CPU, OpenMP ties the engine's thread to one processor, and threads that it starts inherit that. All decoding
    would be done there: with vLLM's KMP_AFFINITY on two processors, both threads that decode ran on the first one.
    """
    allowed: set[int] = set()
    with suppress(OSError):  # where /proc or setting is forbidden; raised here, it would end all loads
        for thread in _THREADS_OF_PROCESS.iterdir():
            with suppress(ProcessLookupError):  # it has ended since
                allowed |= os.sched_getaffinity(int(thread.name))
        os.sched_setaffinity(0, allowed)
