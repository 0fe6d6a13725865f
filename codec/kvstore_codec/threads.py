"""Keeping a thread's tensor work in that thread.

PyTorch hands work to a team of OpenMP threads that belongs to whoever calls: a thread that restores KV beside a model
would start a team of its own, and the two would wait for each other's cores. `torch.set_num_threads` is no help: it
changes the whole process. OpenMP, and MKL within it, keep a count for each thread apart.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def in_this_thread_alone() -> Iterator[None]:
    """Tensors are computed in the calling thread alone; other threads keep theirs. May be nested."""
    openmp, mkl = _library("omp_set_num_threads"), _library("MKL_Set_Num_Threads_Local")
    threads = (
        torch.get_num_threads()
    )  # a new thread takes its count over when it is asked first: not after ours
    if openmp:
        openmp.omp_set_num_threads(1)
    of_mkl = mkl.MKL_Set_Num_Threads_Local(1) if mkl else 0  # 0: as many as OpenMP
    try:
        yield
    finally:
        if openmp:
            openmp.omp_set_num_threads(threads)
        if mkl:
            mkl.MKL_Set_Num_Threads_Local(of_mkl)


@functools.cache
def _library(function: str) -> ctypes.CDLL | None:
    """Where PyTorch's own calls of that function go to; None where it makes none."""
    for name in (None, torch._C.__file__):  # what was loaded ahead of all others comes first for PyTorch too
        try:
            library = ctypes.CDLL(name)
        except (OSError, TypeError):  # Windows has no handle of the process itself
            continue
        if hasattr(library, function):
            return library
    return None
