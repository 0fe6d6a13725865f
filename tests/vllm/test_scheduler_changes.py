"""The scheduler's half when things change while a request waits: loads that end, and a canary that is replaced."""

import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import grpc
import pytest
import torch

from kvstore_api.v1 import kvstore_pb2 as pb
from kvstore_api.v1 import kvstore_pb2_grpc as rpc
from kvstore_client.client import KVStoreClient, connect
from kvstore_client.engines.vllm.canary import EngineCanary, engine_probe
from kvstore_client.engines.vllm.scheduler import LoadLimits, SchedulerHalf
from kvstore_client.new_chunk import NewChunk
from tests.vllm.processes import StoreProcess, prompt, until
from tests.vllm.scheduler_calls import BLOCK, SPEC, answer, news, put, request, scheduled

pytestmark = pytest.mark.vllm


@pytest.fixture
def client(store: StoreProcess, tmp_path: Path) -> Iterator[KVStoreClient]:
    with connect(store.started["address"], cache_dir=tmp_path) as connected:
        yield connected


@pytest.fixture
def adaptive(store: StoreProcess, tmp_path: Path) -> Iterator[SchedulerHalf]:
    client = connect(store.started["address"], cache_dir=tmp_path, fetch_policy="adaptive")
    made = SchedulerHalf(client, SPEC, BLOCK, LoadLimits(loads=1))
    yield made
    made.close()


def test_a_load_that_waits_for_room_is_not_planned_in_each_step(
    adaptive: SchedulerHalf, client: KVStoreClient
) -> None:
    """Hundreds of requests may wait, and planning would delay each step of those that run."""
    tokens = prompt(700, seed=26)
    put(client, tokens)
    adaptive._wait_s = 60.0
    first, second = request(tokens, "first"), request(tokens, "second")
    assert answer(adaptive, first) == (512, True)
    adaptive.allocated(first, [1, 2, 3, 4], 512)
    lookup = adaptive._lookup(adaptive._track(second))
    assert lookup is not None
    lookup.found.result(60)
    assert adaptive.matched_tokens(second, 0) == (None, False)
    adaptive.learn(news(1e4))
    assert adaptive.matched_tokens(second, 0) == (None, False), "it is planned when there is room"
    adaptive.received({"first"}, ())
    assert adaptive.matched_tokens(second, 0) == (0, False)


def test_a_load_of_a_request_that_is_gone_teaches_nothing(
    adaptive: SchedulerHalf, client: KVStoreClient
) -> None:
    """It was cancelled, however long it would have taken."""
    tokens = prompt(700, seed=25)
    put(client, tokens)
    for name, is_gone in (("gone", True), ("there", False)):
        asked = request(tokens, name)
        assert answer(adaptive, asked) == (512, True)
        adaptive.allocated(asked, [1, 2, 3, 4], 512)
        if is_gone:
            adaptive.finished(name)
        adaptive.received({name}, ())
        assert adaptive._plans is not None
        assert len(adaptive._plans._delays) == (0 if is_gone else 1)
    assert not adaptive._in_flight


def test_chunks_from_before_their_canary_was_replaced_are_not_found_by_an_engine_that_has_just_started(
    client: KVStoreClient, store: StoreProcess, tmp_path: Path
) -> None:
    """The worker that stored them computed other KV. The new engine does not know of the replacement yet."""
    spec = replace(SPEC, layers=4, weights_digest=bytes([7]) * 32)
    tokens = prompt(700, seed=27)
    kv = torch.randn(4, 2, spec.kv_heads, 512, spec.head_dim)
    canary = EngineCanary(
        client,
        spec,
        engine_probe(512),
        lambda layer, *_: (kv[layer, 0], kv[layer, 1]),
        device="cpu",
        is_required=True,
    )
    canary.computed((1, 2, 3, 4))
    until(lambda: canary.refusal(0) is None)
    chunks = [
        NewChunk(
            chunk_id,
            partial(lambda at: (kv[:, 0, :, at], kv[:, 1, :, at]), slice(256 * index, 256 * index + 256)),
        )
        for index, chunk_id in enumerate(client.chunk_ids(spec, tokens))
    ]
    assert client.store.put(spec, chunks).result() == 2
    with grpc.insecure_channel(store.started["address"]) as channel:
        rpc.CoordinatorStub(channel).ReplaceCanary(pb.ReplaceCanaryRequest(model_digest=spec.digest))
    half = SchedulerHalf(connect(store.started["address"], cache_dir=tmp_path), spec, BLOCK)
    asked = request(tokens)
    assert answer(half, asked) == (0, False)
    (save,) = half.saves(scheduled(asked, list(range(6)), 700))
    assert not set(save.text) & {chunk.chunk_id for chunk in chunks}
    half.close()


def test_chunks_that_wait_for_a_pause_of_the_engine_are_not_handed_over_again(
    store: StoreProcess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = connect(
        store.started["address"],
        cache_dir=tmp_path,
        store_idle_wait_s=4,
        put_timeout_s=60,
        fetch_policy="fixed",
    )
    half, tokens = SchedulerHalf(client, SPEC, BLOCK), prompt(900, seed=31)
    first, second = request(tokens), request(tokens, "again")
    assert answer(half, first) == (0, False)
    (save,) = half.saves(scheduled(first, list(range(8)), 900))
    assert save.chunks == 3
    monkeypatch.setattr(half._stored, "_clock", lambda: time.monotonic() + 30)
    assert answer(half, second) == (0, False)
    assert half.saves(scheduled(second, list(range(8)), 900)) == ()
    half.close()
