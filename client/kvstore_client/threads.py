"""Keeps background threads that compute out of the way of the engine's."""

import ctypes
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import TypeVar

import torch
from threadpoolctl import ThreadpoolController

from kvstore_client.processors import leave_engines_processor
from kvstore_client.request_id import in_request

Result = TypeVar("Result")

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


def run_apart(name: str, compute: Callable[[], Result]) -> Result:
    """Run `compute` in a thread of its own that ends with it. Returns its result, or raises its exception.

    A thread that lives long and computes with torch only now and then uses this. Intel's OpenMP, which vLLM loads,
    counts every thread that has ever computed, until the thread ends. With more of them than processors, the engine's
    threads yield to each other instead of spinning for work: one more, asleep, nearly doubled the time of operations on
    one token of SmolLM2 on two processors.
    """
    result: Future[Result] = Future()

    @single_threaded()
    def run() -> None:
        try:
            result.set_result(compute())
        except BaseException as error:
            result.set_exception(error)

    def run_elsewhere() -> None:
        leave_engines_processor()
        run()

    thread = threading.Thread(target=in_request(run_elsewhere), name=name, daemon=True)
    try:
        thread.start()
    except RuntimeError:  # the process has no thread left, or the interpreter is exiting
        run()
    else:
        thread.join()
    return result.result()
