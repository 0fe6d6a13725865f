"""What every test starts from."""

from collections.abc import Iterator

import pytest
import torch

# See CachedModel.__init__: the first cosine of a process must not be computed by several threads at once.
torch.ones(1).cos()


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Tensors as small as in most tests only make torch's threads wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
