"""Loads of the worker's half, into tensors as the engine has them, from a real store."""

import itertools
import math
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kvstore_client.client import KVStoreClient, connect
from kvstore_client.engines.vllm.destination import PagedDestination
from kvstore_client.engines.vllm.layout import RowMajorCpuLayout
from kvstore_client.engines.vllm.loads import LoadedBlocks, Loads
from kvstore_client.engines.vllm.metadata import LoadRequest
from kvstore_client.fetch import pipeline
from kvstore_client.new_chunk import NewChunk
from kvstore_client.planning import PrefillCost
from kvstore_codec.identity import CHUNK_TOKENS, ChunkId
from kvstore_codec.model_spec import KVDtype, ModelSpec
from tests.vllm.processes import StoreProcess, free_port, prompt, until

pytestmark = pytest.mark.vllm

SPEC = ModelSpec("tiny", bytes(32), 2, 2, 16, KVDtype.FLOAT32, None, numerics=(("keys", "after RoPE"),))
BLOCK, BLOCKS, CHUNKS = 128, 16, 4
TABLE = (5, 3, 11, 2, 7, 1, 13, 9)
"""Blocks of a request with four chunks."""


@pytest.fixture
def client(store: StoreProcess, tmp_path: Path) -> Iterator[KVStoreClient]:
    with connect(store.started["address"], cache_dir=tmp_path, stall_timeout_s=1) as connected:
        yield connected


class Worker:
    """The engine's memory, and the loads into it."""

    def __init__(self, client: KVStoreClient) -> None:
        self.layout = RowMajorCpuLayout(BLOCK, SPEC.kv_heads, SPEC.head_dim)
        shape = (BLOCKS, SPEC.kv_heads, BLOCK, 2 * SPEC.head_dim)
        self.tensors = tuple(torch.full(shape, -1.0) for _ in range(SPEC.layers))
        self.loads = Loads(client, SPEC, BLOCK, self._destination)

    def _destination(self, request: LoadRequest) -> PagedDestination:
        return PagedDestination(self.layout, self.tensors, request.block_ids)

    def ended(self) -> LoadedBlocks:
        """What the engine is told next."""
        deadline = time.monotonic() + 60
        while not (ended := self.loads.ended()).request_ids:
            assert time.monotonic() < deadline
            time.sleep(0.001)
        return ended

    def read(self, first_token: int, tokens: int) -> torch.Tensor:
        """Keys of layer 0."""
        return self.layout.read(self.tensors[0], TABLE, first_token, tokens)[0]


@pytest.fixture
def worker(client: KVStoreClient) -> Iterator[Worker]:
    made = Worker(client)
    yield made
    made.loads.close()


_SEEDS = itertools.count()


def stored(client: KVStoreClient, chunks: int = CHUNKS) -> tuple[list[ChunkId], torch.Tensor]:
    """Ids of a new text of which the first chunks are stored, and its keys."""
    ids = client.chunk_ids(SPEC, prompt(CHUNKS * CHUNK_TOKENS, seed=next(_SEEDS)))
    shape = (2, SPEC.layers, SPEC.kv_heads, CHUNKS * CHUNK_TOKENS, SPEC.head_dim)
    kv = torch.randn(shape, generator=torch.Generator().manual_seed(0))

    def gather(index: int) -> Callable[[], tuple[torch.Tensor, torch.Tensor]]:
        keys, values = kv[:, :, :, index * CHUNK_TOKENS : (index + 1) * CHUNK_TOKENS]
        return lambda: (keys, values)

    new = [NewChunk(chunk_id, gather(index)) for index, chunk_id in enumerate(ids[:chunks])]
    assert client.store.put(SPEC, new).result(30) == chunks
    return ids, kv[0]


def load(ids: Sequence[ChunkId], first_token: int = 0, name: str = "request") -> LoadRequest:
    return LoadRequest(name, tuple(ids), first_token, CHUNKS * CHUNK_TOKENS, TABLE)


def test_only_the_loads_own_positions_are_written(worker: Worker, client: KVStoreClient) -> None:
    ids, keys = stored(client)
    worker.loads.start(load(ids, first_token=384))
    assert worker.ended() == LoadedBlocks(frozenset({"request"}))
    assert bool((worker.read(0, 384) == -1).all())
    assert torch.equal(worker.read(384, 640), keys[0, :, 384:])
    assert worker.loads.ended() == LoadedBlocks(), "each load is reported once"


@pytest.mark.parametrize(("chunks", "failed"), [(0, 0), (2, 4), (3, 6)])
def test_blocks_whose_chunks_are_not_there_any_more_have_failed(
    worker: Worker, client: KVStoreClient, chunks: int, failed: int
) -> None:
    ids, _ = stored(client, chunks)
    worker.loads.start(load(ids))
    assert worker.ended() == LoadedBlocks(frozenset({"request"}), frozenset(TABLE[failed:]))


def test_a_load_that_is_overtaken_lacks_nothing_that_is_not_stored(
    store: StoreProcess, tmp_path: Path
) -> None:
    with connect(store.started["address"], cache_dir=tmp_path, fetch_policy="adaptive") as client:
        worker, (ids, _) = Worker(client), stored(client)
        soon = replace(load(ids), prefill=PrefillCost(0.0, 1e-9, 0.0))
        worker.loads.start(soon)
        assert worker.ended() == LoadedBlocks(frozenset({"request"}), frozenset(TABLE))
        assert worker.loads.take_overtaken() == {"request"}
        assert worker.loads.take_overtaken() == frozenset()
        worker.loads.start(replace(soon, chunk_ids=tuple(client.chunk_ids(SPEC, prompt(1024, seed=999)))))
        assert worker.ended().failed_blocks == frozenset(TABLE)
        assert worker.loads.take_overtaken() == frozenset(), "nothing is stored"
        worker.loads.close()


def test_loads_run_on_all_processors_although_the_engines_thread_is_tied_to_one(worker: Worker) -> None:
    everywhere = os.sched_getaffinity(0)
    with ThreadPoolExecutor(1) as others:
        others.submit(os.getpid).result()  # a thread as OpenMP has for the other processors
        os.sched_setaffinity(0, {min(everywhere)})
        try:
            assert worker.loads._threads.submit(os.sched_getaffinity, 0).result() == everywhere
        finally:
            os.sched_setaffinity(0, everywhere)


def test_without_loads_no_thread_of_loads_lives(worker: Worker, client: KVStoreClient) -> None:
    """Each thread that has computed slows down the engine's."""
    ids, _ = stored(client)

    def threads() -> list[threading.Thread]:
        return [thread for thread in threading.enumerate() if thread.name.startswith("kvstore-load")]

    for _ in range(2):
        worker.loads.start(load(ids))
        assert threads()
        worker.ended()
        for thread in threads():
            thread.join(timeout=60)
        assert not threads()


def test_waiting_ends_with_a_load(worker: Worker, client: KVStoreClient) -> None:
    worker.loads.wait(math.inf)  # there is none
    ids, _ = stored(client)
    worker.loads.start(load(ids))
    worker.loads.wait(math.inf)
    assert worker.loads.ended().request_ids == {"request"}


def test_a_damaged_chunk_fails_its_blocks_and_the_request_goes_on(
    worker: Worker, client: KVStoreClient, store: StoreProcess
) -> None:
    ids, keys = stored(client)
    store.ask(damage=ids[2].prefix_id.hex())
    worker.loads.start(load(ids, first_token=128))
    assert worker.ended() == LoadedBlocks(frozenset({"request"}), frozenset(TABLE[4:]))
    assert torch.equal(worker.read(128, 384), keys[0, :, 128:512])
    assert client.metrics.snapshot()["miss_checksum"] == 1


def test_a_store_that_dies_ends_the_load(tmp_path: Path) -> None:
    store = StoreProcess(tmp_path, free_port())
    with connect(store.started["address"], cache_dir=tmp_path) as client:
        worker, (ids, _) = Worker(client), stored(client)
        store.kill()
        worker.loads.start(load(ids))
        assert worker.ended() == LoadedBlocks(frozenset({"request"}), frozenset(TABLE))
        worker.loads.close()


def test_a_cancelled_load_ends_without_failed_blocks(
    worker: Worker, client: KVStoreClient, store: StoreProcess
) -> None:
    """Other requests may use the blocks as soon as the load is reported."""
    ids, _ = stored(client)
    worker.loads.start(load(ids))
    worker.loads.cancel({"request", "another"})
    assert worker.ended() == LoadedBlocks(frozenset({"request"}))
    worker.loads.close()
    until(lambda: store.stats()["leases"] == 0)


def test_a_mistake_in_one_load_keeps_the_engine_waiting_for_none(
    worker: Worker, client: KVStoreClient
) -> None:
    ids, _ = stored(client)
    broken = LoadRequest("broken", tuple(ids), 256, None, TABLE)  # type: ignore[arg-type]
    for request in (broken, load(ids, name="sound")):
        worker.loads.start(request)
    first = worker.ended()
    both = first if len(first.request_ids) == 2 else worker.ended()
    assert first.request_ids | both.request_ids == {"broken", "sound"}
    assert first.failed_blocks | both.failed_blocks == set(TABLE[2:])
    assert client.metrics.snapshot()["miss_internal_error"] >= 1
    assert worker.loads.ended() == LoadedBlocks()


def no_thread_left(*_: object) -> None:
    raise RuntimeError("can't start new thread")


def test_leases_that_cannot_be_released_keep_the_engine_waiting_for_no_load(
    worker: Worker, client: KVStoreClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """gRPC needs a thread for a call, and this process may have none left."""
    ids, _ = stored(client, 1)
    monkeypatch.setattr(client, "release", no_thread_left)
    worker.loads.start(load(ids, first_token=256))
    assert worker.ended() == LoadedBlocks(frozenset({"request"}), frozenset(TABLE[2:]))
    assert client.metrics.snapshot()["miss_no_resources"] == 1


def test_a_fetch_that_cannot_release_its_leases_keeps_the_engine_waiting_for_no_load(
    worker: Worker, client: KVStoreClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids, _ = stored(client)
    with monkeypatch.context() as failing:
        failing.setattr(pipeline, "release", no_thread_left)
        worker.loads.start(load(ids))
        assert worker.ended() == LoadedBlocks(frozenset({"request"}), frozenset(TABLE))
    assert client.metrics.snapshot()["miss_internal_error"] == 1
    assert worker.loads.ended() == LoadedBlocks()


def test_closing_ends_all_loads(worker: Worker, client: KVStoreClient, store: StoreProcess) -> None:
    ids, _ = stored(client)
    for number in range(8):
        worker.loads.start(load(ids, name=f"request {number}"))
    worker.loads.close()
    assert len(worker.loads.ended().request_ids) == 8
    until(lambda: store.stats()["leases"] == 0)
    worker.loads.start(load(ids, name="late"))
    assert worker.ended() == LoadedBlocks(frozenset({"late"}), frozenset(TABLE))
