"""Long work on a node's metadata is done a slice at a time, so that lookups never wait for all of it."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Condition

SLICE_CHUNKS = 2048
"""Chunks that are looked up under one acquisition of the lock: 3 ms of it. Common lookups have no more."""
REMOVED_CHUNKS = 256
"""Chunks that are removed under one acquisition of the lock: 3 ms, too."""
PAUSE_S = 200e-6
"""Between slices."""


@contextmanager
def locked_slice(lock: Condition, *, first: bool) -> Iterator[None]:
    """The lock, for a part of a long call. Lets whoever waits for it have it before, unless this is the first part:
    a thread that only releases the lock takes it again before the other one has woken."""
    if not first:
        time.sleep(PAUSE_S)
    with lock:
        yield
