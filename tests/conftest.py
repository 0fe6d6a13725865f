"""What every test starts from."""

import os
import signal
import threading
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


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Tensors as small as in most tests only make torch's threads wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
