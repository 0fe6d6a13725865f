"""Threads of ours beside the engine's."""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from threadpoolctl import ThreadpoolController

# What torch has loaded by now. Only OpenMP's limit is a thread's own, so no other pool is touched.
_openmp = ThreadpoolController().select(user_api="openmp")
# MKL is a part of torch, where threadpoolctl does not find it. None in a build without it.
_set_mkl_threads = getattr(ctypes.CDLL(torch._C.__file__), "MKL_Set_Num_Threads_Local", None)


@contextmanager
def single_threaded() -> Iterator[None]:
    """What the calling thread computes meanwhile, it computes by itself: torch makes no team of threads for it.

    Every thread that computes has a team of its own, which lives as long as it does. With more threads in teams than
    processors, libgomp's stop spinning for work and sleep, those of the engine, too, which are then woken for every
    operation: on two processors, one such team that did nothing at all made a pass of 40 tokens through SmolLM2 35 %
    slower, and one of 400 tokens 15 %.
    """
    torch.get_num_threads()  # sets the thread up, and would undo what follows when first called later
    mkl_threads = _set_mkl_threads(1) if _set_mkl_threads is not None else 0
    try:
        with _openmp.limit(limits=1):
            yield
    finally:
        if _set_mkl_threads is not None:
            _set_mkl_threads(mkl_threads)
