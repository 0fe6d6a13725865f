"""When a request read from disk, for traces."""

import time
from contextvars import ContextVar

MOST_TIMES = 4096
"""Reads of one request that are recorded."""

DiskTimes = list[tuple[int, int, int]]
"""Begin and end of each read, nanoseconds of unix time, and its bytes."""

DISK_TIMES: ContextVar[DiskTimes | None] = ContextVar("kvstore_disk_times", default=None)
"""Where the reads of the current request are recorded. None: nowhere."""


def record(took_s: float, size_bytes: int) -> None:
    """Records a read that has just ended, if the current request records them."""
    times = DISK_TIMES.get()
    if times is not None and len(times) < MOST_TIMES:
        end_ns = time.time_ns()
        times.append((end_ns - round(1e9 * took_s), end_ns, size_bytes))
