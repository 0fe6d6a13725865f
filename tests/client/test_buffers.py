"""Memory for fetched KV: used again, page-locked for a GPU, and never while a copy still reads it."""

import pytest
import torch

from kvstore_client.buffers import BufferPool
from kvstore_codec.model_spec import KVDtype
from tests.codec.chunks import make_spec

SPEC = make_spec(layers=2, kv_heads=1, head_dim=16, dtype=KVDtype.FLOAT32)
ROOMY = 1 << 20


class RunningCopy:
    """A copy that ends when it is told to."""

    ended = False

    def query(self) -> bool:
        return self.ended


def address(pool: BufferPool) -> int:
    return pool.acquire(SPEC, 64).memory.data_ptr()


def test_memory_that_was_given_back_is_used_again() -> None:
    pool = BufferPool(ROOMY)
    buffers = pool.acquire(SPEC, 64)
    pool.release(buffers)
    assert address(pool) == buffers.memory.data_ptr()


def test_memory_that_a_copy_still_reads_is_not_used_again_before_the_copy_has_ended() -> None:
    pool, copies = BufferPool(ROOMY), [RunningCopy(), RunningCopy()]
    buffers = pool.acquire(SPEC, 64)
    buffers.copies.extend(copies)
    pool.release(buffers)
    others = [pool.acquire(SPEC, 64)]
    copies[0].ended = True
    others.append(pool.acquire(SPEC, 64))
    assert all(other.memory.data_ptr() != buffers.memory.data_ptr() for other in others)
    copies[1].ended = True
    assert address(pool) == buffers.memory.data_ptr()


def test_memory_over_the_limit_is_let_go() -> None:
    pool = BufferPool(0)
    buffers = pool.acquire(SPEC, 64)
    pool.release(buffers)
    assert address(pool) != buffers.memory.data_ptr()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="page-locked memory needs a CUDA device")
def test_memory_is_page_locked_where_there_is_a_gpu() -> None:
    pool = BufferPool(ROOMY)
    pool.reserve(4096)
    assert pool.acquire(SPEC, 1).memory.is_pinned()
