"""Threads that an engine's thread starts, which OpenMP has tied to one processor."""

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from kvstore_client.processors import leave_engines_processor

pytestmark = pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="there is one processor only")


def processors(initializer: Callable[[], None] | None) -> tuple[set[int], set[int]]:
    """Those of a tied thread that has started a pool, and those of a thread that the pool's thread has started."""
    found: list[set[int]] = []

    def start_another() -> None:
        thread = threading.Thread(target=lambda: found.append(os.sched_getaffinity(0)))
        thread.start()
        thread.join()

    def tied() -> None:
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
        with ThreadPoolExecutor(1, initializer=initializer) as pool:
            pool.submit(start_another).result()
        found.append(os.sched_getaffinity(0))

    engine = threading.Thread(target=tied)
    engine.start()
    engine.join()
    inherited, own = found
    return own, inherited


def test_threads_of_loads_use_all_processors_and_the_engines_thread_stays() -> None:
    everywhere = os.sched_getaffinity(0)
    own, inherited = processors(leave_engines_processor)
    assert (len(own), inherited) == (1, everywhere)
    assert processors(None) == (own, own), "a thread inherits the processor of the one that starts it"
