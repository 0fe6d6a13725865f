"""vLLM's own types read the KV events of a cluster."""

import pytest

from kvstore_api.kv_events import DISK, MEMORY, Cleared, Removed, Stored, encode_batch

pytestmark = pytest.mark.vllm


def test_vllm_reads_a_batch() -> None:
    import msgspec
    from vllm.distributed.kv_events import (
        MEDIUM_CPU,
        MEDIUM_STORAGE,
        AllBlocksCleared,
        BlockRemoved,
        BlockStored,
        KVEventBatch,
    )

    payload = encode_batch(
        12.5, [Cleared(), Stored([b"a" * 32, b"b" * 32], MEMORY), Removed([b"a" * 32], DISK)]
    )
    batch = msgspec.msgpack.Decoder(KVEventBatch).decode(payload)
    cleared, stored, removed = batch.events
    assert (batch.ts, batch.data_parallel_rank) == (12.5, 0)
    assert isinstance(cleared, AllBlocksCleared)
    assert isinstance(stored, BlockStored)
    assert isinstance(removed, BlockRemoved)
    assert (stored.block_hashes, stored.medium) == ([b"a" * 32, b"b" * 32], MEDIUM_CPU)
    assert (removed.block_hashes, removed.medium) == ([b"a" * 32], MEDIUM_STORAGE)
    assert (stored.block_size, stored.locality, stored.ownership) == (256, "REMOTE", "kvstore")
    assert msgspec.msgpack.Decoder(KVEventBatch).decode(encode_batch(0.0, [])).events == []
