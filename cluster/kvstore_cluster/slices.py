"""Splits long work on a node's metadata into slices, so that lookups never wait for all of it."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Condition

SLICE_CHUNKS = 2048
"""Chunks that are looked up in one slice, which takes 3 ms. Most lookups have fewer chunks."""
REMOVED_CHUNKS = 256
"""Chunks that are removed in one slice, which takes 3 ms."""
PAUSE_S = 200e-6
"""Pause between two slices."""


@contextmanager
def locked_slice(lock: Condition, *, first: bool) -> Iterator[None]:
    """Holds the lock for one slice of a long call. Pauses before every slice but the `first`, so that waiting threads
    get the lock: without the pause the same thread acquires it again before another one wakes."""
    if not first:
        time.sleep(PAUSE_S)
    with lock:
        yield
