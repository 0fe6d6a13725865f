"""What every test starts from."""

import os
from collections.abc import Iterator

import hypothesis
import pytest
import torch

# Models as small as in most tests compute sooner than anything can be fetched. Also for the processes they start.
os.environ.setdefault("KVSTORE_FETCH_POLICY", "fixed")

# How long an example takes says what else the machine does, not whether the code is right.
hypothesis.settings.register_profile("no_deadline", deadline=None)
hypothesis.settings.load_profile("no_deadline")

# See CachedModel.__init__: the first cosine of a process must not be computed by several threads at once.
torch.ones(1).cos()


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Tensors as small as in most tests only make torch's threads wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
