"""Threads of ours beside the engine's."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from threadpoolctl import ThreadpoolController

_pools = ThreadpoolController()  # finds the OpenMP that torch has loaded by now


@contextmanager
def single_threaded() -> Iterator[None]:
    """What the calling thread computes meanwhile, it computes by itself: torch makes no team of OpenMP threads for it.

    Every thread that computes has a team of its own, which lives as long as it does. With more threads in teams than
    processors, libgomp's stop spinning for work and sleep, those of the engine, too, which are then woken for every
    operation: on two processors, one such team that did nothing at all made a pass of 40 tokens through SmolLM2 35 %
    slower, and one of 400 tokens 15 %.
    """
    torch.get_num_threads()  # sets the thread up, and would undo what follows when first called later
    with _pools.limit(limits=1, user_api="openmp"):
        yield
