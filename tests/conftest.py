"""What every test starts from."""

import gc
import os
import signal
import threading
import time
from collections.abc import Iterator

import hypothesis
import pytest
import torch

# Models as small as in most tests compute sooner than anything can be fetched. Also for the processes they start.
os.environ.setdefault("KVSTORE_FETCH_POLICY", "fixed")

# A shell ignores Ctrl-C for what it runs in the background, and the processes of tests would inherit that.
if (
    threading.current_thread() is threading.main_thread()
    and signal.getsignal(signal.SIGINT) is signal.SIG_IGN
):
    signal.signal(signal.SIGINT, signal.default_int_handler)

# How long an example takes says what else the machine does, not whether the code is right.
hypothesis.settings.register_profile("no_deadline", deadline=None)
hypothesis.settings.load_profile("no_deadline")

# See TransformersEngine.__init__: the first cosine of a process must not be computed by several threads at once.
torch.ones(1).cos()


def pytest_collection() -> None:
    gc.disable()


def pytest_collection_finish() -> None:
    """Imported modules are a million objects. Every full collection would look at them again, for a second."""
    gc.collect()
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="module", autouse=True)
def no_thread_stays_behind() -> Iterator[None]:
    """Hundreds of forgotten background threads make later tests slow, and fail by timeouts."""
    before = set(threading.enumerate())
    yield
    patience_s = time.monotonic() + 10
    while (left := _background_threads() - before) and time.monotonic() < patience_s:
        time.sleep(0.05)
    assert not left, sorted(thread.name for thread in left)


def _background_threads() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name.startswith("kvstore-")}


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Tensors as small as in most tests only make torch's threads wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
