"""Tensor work that stays in its thread."""

from __future__ import annotations

import sys
import threading
from pathlib import Path

import pytest
import torch

from kvstore_codec.threads import in_this_thread_alone

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or "OpenMP" not in torch.__config__.parallel_info(),
    reason="counts the threads of a process that uses OpenMP",
)


def threads() -> int:
    return len(list(Path("/proc/self/task").iterdir()))


def test_only_the_thread_that_asks_computes_alone() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    seen: list[int] = []
    try:
        matrix = torch.ones(600, 600)

        def work() -> None:
            with in_this_thread_alone():
                with in_this_thread_alone():
                    seen.append(torch.get_num_threads())
                begin = threads()
                matrix @ matrix
                seen.append(torch.get_num_threads())
                seen.append(1 + threads() - begin)  # no team was started
            seen.append(torch.get_num_threads())

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert seen == [1, 1, 1, 2]


def test_an_error_ends_it() -> None:
    before = torch.get_num_threads()
    with pytest.raises(ValueError, match="stop"), in_this_thread_alone():
        raise ValueError("stop")
    assert torch.get_num_threads() == before
