"""Cap OpenMP/MKL threads in background workers."""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from threadpoolctl import ThreadpoolController

# Libraries that torch has loaded by now. Only OpenMP's limit is per thread, so no other pool is touched.
_openmp = ThreadpoolController().select(user_api="openmp")
# MKL is part of torch, where threadpoolctl does not find it. None in a build without it.
_set_mkl_threads = getattr(ctypes.CDLL(torch._C.__file__), "MKL_Set_Num_Threads_Local", None)


@contextmanager
def single_threaded() -> Iterator[None]:
    """Let torch compute in the calling thread alone inside the block, without a thread team.

    Every thread that computes gets a team of its own, which lives as long as the thread. With more threads in teams
    than processors, libgomp's threads, including the engine's, sleep instead of spinning for work, and are then woken
    for every operation: on two processors, one idle team of this kind made a pass of 40 tokens through SmolLM2 35 %
    slower, and one of 400 tokens 15 %.
    """
    torch.get_num_threads()  # initialises the thread's settings; a later first call would undo the cap
    mkl_threads = _set_mkl_threads(1) if _set_mkl_threads is not None else 0
    try:
        with _openmp.limit(limits=1):
            yield
    finally:
        if _set_mkl_threads is not None:
            _set_mkl_threads(mkl_threads)
