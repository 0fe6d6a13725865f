"""The store below vLLM's own offloading: its real manager and host memory, and a store that is killed."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import pytest
from vllm.v1.kv_offload.base import LookupResult, OffloadKey, ReqContext, ScheduleEndContext, make_offload_key
from vllm.v1.kv_offload.config import (
    OffloadingCacheConfig,
    OffloadingConfig,
    OffloadingGroupConfig,
    OffloadingModelConfig,
    OffloadingParallelConfig,
)
from vllm.v1.kv_offload.tiering.spec import TieringOffloadingSpec

from kvstore_bench.vllm.policies import offloading_connector
from kvstore_client.engines.vllm.tier import KVStoreTier
from kvstore_client.engines.vllm.tier_namespace import page_namespace
from kvstore_codec.errors import ConfigurationError, UnsupportedEngineError, UnsupportedModelError
from tests.vllm.models import saved_model
from tests.vllm.processes import StoreProcess, free_port

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]

CHUNK_BYTES = 64 << 10
HOST_CHUNKS = 32
PATIENCE_S = 60.0


def offloading(model: Path, *tiers: dict[str, Any]) -> OffloadingConfig:
    """What vLLM makes of the settings of an engine with one rank."""
    return OffloadingConfig(
        groups=(OffloadingGroupConfig(tokens_per_block=16, layer_names=("layer.0",), group_id=0),),
        worker_kv_bytes_per_block=CHUNK_BYTES,
        enable_kv_cache_events=False,
        extra_config={"cpu_bytes_to_use": HOST_CHUNKS * CHUNK_BYTES, "secondary_tiers": list(tiers)},
        engine_id=uuid4().hex,
        model=OffloadingModelConfig(str(model), "float32"),
        cache=OffloadingCacheConfig(tokens_per_hash=16, blocks_per_chunk=1),
        parallel=OffloadingParallelConfig(
            rank=0,
            world_size=1,
            tp_size=1,
            pp_size=1,
            pcp_size=1,
            dcp_size=1,
            data_parallel_index=0,
            data_parallel_size=1,
            data_parallel_rank_local=None,
            is_parallelism_agnostic=True,
        ),
    )


class Engine:
    """The scheduler's side of an engine that offloads, without a GPU: the test writes and reads the host memory."""

    def __init__(self, model: Path, address: str, cache_dir: Path, **tier: Any) -> None:
        settings = {
            "type": "KVStoreTier",
            "module_path": "kvstore_client.engines.vllm.tier",
            "address": address,
            "cache_dir": str(cache_dir),
            "fetch_timeout_s": 5.0,
            "put_timeout_s": 5.0,
        }
        self._spec = TieringOffloadingSpec(offloading(model, settings | tier))
        self._manager = self._spec.get_manager()
        self._tier = self._manager.secondary_tiers[0]
        assert isinstance(self._tier, KVStoreTier)
        self.rows = np.asarray(self._manager.primary_tier.get_kv_memoryview()).view(np.uint8)
        self._requests = 0

    def request(self) -> ReqContext:
        self._requests += 1
        context = ReqContext(f"request-{self._requests}")
        self._manager.on_new_request(context)
        return context

    def step(self, context: ReqContext) -> None:
        self._manager.on_schedule_end(ScheduleEndContext((context.req_id,), ()))

    def offload(self, keys: Sequence[OffloadKey], chunks: Sequence[bytes]) -> None:
        """Bring computed chunks to the host memory, and from there to the tier."""
        context = self.request()
        prepared = self._manager.prepare_store(keys, context)
        assert prepared is not None
        for row, chunk in zip(prepared.store_spec.chunk_ids, chunks, strict=True):
            self.rows[row] = np.frombuffer(chunk, np.uint8)
        self._manager.complete_store(keys, context)
        self.step(context)
        self._manager.on_request_finished(context)
        self.settle(context)

    def settle(self, context: ReqContext) -> None:
        """Until no job of the tier is under way."""

        def idle() -> bool:
            self.step(context)
            return not self._tier._running

        until(idle)

    def found(self, keys: Sequence[OffloadKey]) -> list[bytes]:
        """The leading chunks that can be loaded, in the host memory."""
        context = self.request()
        answers: list[LookupResult] = []

        def answered() -> bool:
            nonlocal answers
            answers = [self._manager.lookup(key, context) for key in keys]
            self.step(context)
            return set(answers) <= {LookupResult.HIT, LookupResult.MISS}

        until(answered)
        run = [key for key, answer in zip(keys, answers, strict=True) if answer is LookupResult.HIT]
        assert run == list(keys[: len(run)])
        loaded = []
        if run:
            loaded = [self.rows[row].tobytes() for row in self._manager.prepare_load(run, context).chunk_ids]
            self._manager.complete_load(run, context)
        self._manager.on_request_finished(context)
        self.step(context)
        return loaded

    def forget(self) -> None:
        """Empty the host memory."""
        self._manager.primary_tier.reset_cache()

    def reset(self) -> None:
        """As vLLM does with all of its caches before its weights are replaced."""
        self._manager.reset_cache()

    def close(self) -> None:
        self._manager.shutdown()


@contextmanager
def engine(model: Path, address: str, cache_dir: Path, **tier: Any) -> Iterator[Engine]:
    made = Engine(model, address, cache_dir, **tier)
    try:
        yield made
    finally:
        made.close()


def until(condition: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.005)


def chunks_of(text: str, count: int) -> tuple[list[OffloadKey], list[bytes]]:
    keys = [make_offload_key(sha256(f"{text} {index}".encode()).digest(), 0) for index in range(count)]
    noise = np.random.default_rng(int.from_bytes(keys[0][:4]))
    return keys, [noise.bytes(CHUNK_BYTES) for _ in keys]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved_model(tmp_path_factory.mktemp("model"), seed=0)


@pytest.fixture
def dying_store(tmp_path: Path) -> Iterator[StoreProcess]:
    """One that no other test needs."""
    started = StoreProcess(tmp_path / "store", free_port())
    yield started
    started.close()


def test_a_second_engine_loads_what_the_first_one_offloaded(
    model: Path, store: StoreProcess, tmp_path: Path
) -> None:
    keys, chunks = chunks_of("a text", 12)
    more, _ = chunks_of("another text", 3)
    with engine(model, store.started["address"], tmp_path) as first:
        before = store.stats()["chunks"]
        first.offload(keys, chunks)
        assert store.stats()["chunks"] == before + len(keys)
        first.forget()
        assert first.found(keys) == chunks
    with engine(model, store.started["address"], tmp_path) as second:
        assert second.found([*keys, *more]) == chunks
        assert second.found(more) == []
    until(lambda: store.stats()["leases"] == 0)


def test_after_a_reset_an_engine_meets_only_its_own_chunks(
    model: Path, store: StoreProcess, tmp_path: Path
) -> None:
    """It may have other weights then, under the same checkpoint's name."""
    before, chunks = chunks_of("before the reset", 4)
    after, others = chunks_of("after the reset", 3)
    address = store.started["address"]
    with engine(model, address, tmp_path) as first, engine(model, address, tmp_path) as second:
        first.offload(before, chunks)
        asks = first.request()
        first.reset()
        assert first.found(before) == []
        first.offload(after, others)
        first.offload(before, chunks[::-1])
        first.forget()
        assert first.found(after) == others
        assert first.found(before) == chunks[::-1]
        assert second.found(after) == []
        assert second.found(before) == chunks
        first._manager.on_request_finished(asks)
        first.reset()
        assert first.found(after) == []
    until(lambda: store.stats()["leases"] == 0)


def test_another_model_layout_or_salt_finds_nothing(model: Path, store: StoreProcess, tmp_path: Path) -> None:
    keys, chunks = chunks_of("a text of one model", 4)
    other = saved_model(tmp_path / "other", seed=1)
    address = store.started["address"]
    with engine(model, address, tmp_path) as first:
        first.offload(keys, chunks)
    for named, tier in ((other, {}), (model, {"salt": "adapters of team b"}), (model, {"tenant_salt": "b"})):
        with engine(named, address, tmp_path, **tier) as stranger:
            assert stranger.found(keys) == []
    with engine(model, address, tmp_path, checkpoint=str(model)) as same:
        assert same.found(keys) == chunks


def test_every_part_of_the_layout_is_part_of_the_namespace(model: Path, tmp_path: Path) -> None:
    config = offloading(model)
    others = [
        replace(config, groups=(replace(config.groups[0], tokens_per_block=32),)),
        replace(config, kv_cache_layout="HND"),
        replace(config, canonical_layout=True),
        replace(config, model=replace(config.model, dtype="bfloat16")),
        replace(config, cache=replace(config.cache, blocks_per_chunk=2)),
        replace(config, parallel=replace(config.parallel, tp_size=2)),
    ]
    named = [page_namespace(one, CHUNK_BYTES, None, "", tmp_path).digest for one in (config, *others)]
    named.append(page_namespace(config, 2 * CHUNK_BYTES, None, "", tmp_path).digest)
    assert len(set(named)) == len(named)
    assert page_namespace(offloading(model), CHUNK_BYTES, None, "", tmp_path).digest == named[0]


def test_a_store_that_is_killed_costs_the_engine_nothing(
    model: Path, dying_store: StoreProcess, tmp_path: Path
) -> None:
    """Chunks that were found and can no longer be loaded become misses, and jobs end."""
    keys, chunks = chunks_of("a text", 8)
    with engine(model, dying_store.started["address"], tmp_path, lookup_timeout_s=0.5) as offloads:
        offloads.offload(keys, chunks)
        offloads.forget()
        dying_store.kill()
        assert offloads.found(keys) == []
        offloads.offload(*chunks_of("a text that cannot be stored", 4))
        offloads.forget()


def test_a_chunk_that_is_gone_when_it_is_loaded_becomes_a_miss(
    model: Path, dying_store: StoreProcess, tmp_path: Path
) -> None:
    keys, chunks = chunks_of("a text", 4)
    with engine(model, dying_store.started["address"], tmp_path, lookup_timeout_s=0.5) as offloads:
        offloads.offload(keys, chunks)
        offloads.forget()
        context = offloads.request()
        manager = offloads._manager

        def promoted() -> bool:
            answer = manager.lookup(keys[0], context)
            if answer is LookupResult.RETRY:
                offloads.step(context)
            return answer is LookupResult.HIT_PENDING

        until(promoted)
        dying_store.kill()  # between the lookup and the load
        offloads.step(context)

        def missed() -> bool:
            answer = manager.lookup(keys[0], context)
            offloads.step(context)
            return answer is LookupResult.MISS

        until(missed)
        manager.on_request_finished(context)


def test_a_tier_that_cannot_name_its_chunks_is_refused(
    model: Path, store: StoreProcess, tmp_path: Path
) -> None:
    address = store.started["address"]
    named = offloading(model)
    revision_unknown = replace(named, model=replace(named.model, name="someone/model"))
    with pytest.raises(UnsupportedEngineError, match="is not a folder, and vLLM does not say which revision"):
        page_namespace(revision_unknown, CHUNK_BYTES, None, "", tmp_path)
    quantised = replace(named, model=replace(named.model, dtype="fp8_e4m3"))
    with pytest.raises(UnsupportedEngineError, match="a KV cache of fp8_e4m3 is not supported"):
        page_namespace(quantised, CHUNK_BYTES, None, "", tmp_path)
    with pytest.raises(UnsupportedModelError, match="save_pretrained"):
        Engine(tmp_path, address, tmp_path, checkpoint=str(empty_checkpoint(tmp_path)))
    with pytest.raises(ConfigurationError, match="adress"):
        Engine(model, address, tmp_path, adress="127.0.0.1:1")


def test_vllm_takes_the_benchmarks_configuration(model: Path, store: StoreProcess, tmp_path: Path) -> None:
    """On a CPU, where vLLM refuses the connector itself."""
    transfer = offloading_connector(store.started["address"], tmp_path, model, 1 << 20).transfer
    config = replace(offloading(model), extra_config=transfer["kv_connector_extra_config"])
    manager = TieringOffloadingSpec(config).get_manager()
    assert [type(tier) for tier in manager.secondary_tiers] == [KVStoreTier]
    manager.shutdown()


def empty_checkpoint(folder: Path) -> Path:
    made = folder / "empty"
    made.mkdir()
    (made / "config.json").write_text('{"model_type": "llama"}')
    return made
