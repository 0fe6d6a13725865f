"""The connector as vLLM's own code calls it, with a real configuration and a real store, without an engine."""

from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.config import KVTransferConfig, VllmConfig, set_current_vllm_config
from vllm.distributed.kv_transfer import kv_transfer_state
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
from vllm.engine.arg_utils import EngineArgs
from vllm.forward_context import set_forward_context
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend, CPUAttentionBackendImpl, _get_attn_isa
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.worker.kv_connector_model_runner_mixin import KVConnectorModelRunnerMixin

from kvstore_client.engines.adapter import AdapterFiles
from kvstore_client.engines.vllm.connector import KVStoreConnector
from kvstore_client.engines.vllm.metadata import AdapterUse, LoadRequest, SaveRequest, StepMetadata
from kvstore_client.engines.vllm.requirements import require_cache
from kvstore_codec.errors import UnsupportedEngineError
from tests.vllm.models import saved_model
from tests.vllm.processes import StoreProcess, prompt

pytestmark = pytest.mark.vllm

BLOCK, BLOCKS, LAYERS = 128, 8, 4
NAMES = [f"model.layers.{layer}.self_attn.attn" for layer in range(LAYERS)]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, store: StoreProcess) -> VllmConfig:
    folder = tmp_path_factory.mktemp("model")
    return EngineArgs(
        model=str(saved_model(folder / "model", seed=0)),
        skip_tokenizer_init=True,
        dtype="float32",
        block_size=BLOCK,
        kv_transfer_config=KVTransferConfig(
            kv_connector="KVStoreConnector",
            kv_connector_module_path="kvstore_client.engines.vllm",
            kv_role="kv_both",
            kv_load_failure_policy="recompute",
            kv_connector_extra_config={
                "address": store.started["address"],
                "cache_dir": str(folder / "cache"),
            },
        ),
    ).create_engine_config()


def cache_config(**more: Any) -> KVCacheConfig:
    cache = FullAttentionSpec(block_size=BLOCK, num_kv_heads=2, head_size=32, dtype=torch.float32, **more)
    return KVCacheConfig(BLOCKS, [], [KVCacheGroupSpec(NAMES, cache)])


def attention_layer(tensor: torch.Tensor) -> SimpleNamespace:
    """What the connector asks of a layer of the model, with vLLM's own kernels."""
    return SimpleNamespace(
        get_attn_backend=lambda: CPUAttentionBackend,
        impl=CPUAttentionBackendImpl(4, 32, 32**-0.5, 2, None, None, "auto"),
        kv_cache=tensor,
        isa=_get_attn_isa(torch.float32, BLOCK, 32),
        _k_scale_float=1.0,
        _v_scale_float=1.0,
    )


@pytest.fixture
def worker(config: VllmConfig, monkeypatch: pytest.MonkeyPatch) -> Iterator[KVStoreConnector]:
    """A worker's connector with its memory, where vLLM's runner finds it."""
    made = KVStoreConnector(config, KVConnectorRole.WORKER, cache_config())
    memory = {name: torch.zeros(BLOCKS, 2, BLOCK, 64) for name in NAMES}
    with set_current_vllm_config(config):
        layers = {name: attention_layer(tensor) for name, tensor in memory.items()}
    config.compilation_config.static_forward_context.update(layers)
    made.register_kv_caches(memory)
    monkeypatch.setattr(kv_transfer_state, "_KV_CONNECTOR_AGENT", made)
    yield made
    made.shutdown()


def step(config: VllmConfig, metadata: StepMetadata, error: Exception | None = None) -> Any:
    """One step of vLLM's runner, whose forward pass may fail."""
    output = SchedulerOutput.make_empty()
    output.kv_connector_metadata = metadata
    with (
        set_forward_context(None, config),
        KVConnectorModelRunnerMixin.maybe_get_kv_connector_output(output) as told,
    ):
        if error is not None:
            raise error
    return told


def save(worker: KVStoreConnector, seed: int) -> SaveRequest:
    ids = worker._client.chunk_ids(worker._spec, prompt(512, seed))
    return SaveRequest(tuple(ids), 0, 0, (1, 2, 3, 4))


def test_what_a_failed_step_left_in_the_blocks_is_not_stored(
    worker: KVStoreConnector, config: VllmConfig, store: StoreProcess
) -> None:
    """vLLM's runner ends a failed step with the hooks of a sound one."""
    with pytest.raises(RuntimeError, match="out of memory"):
        step(config, StepMetadata(saves=(save(worker, 1),)), RuntimeError("out of memory"))
    worker._client.store.flush()
    assert store.stats()["chunks"] == 0
    step(config, StepMetadata(saves=(save(worker, 1),)))
    worker._client.store.flush()
    assert store.stats()["chunks"] == 2


def test_a_load_that_fails_is_reported_as_received(worker: KVStoreConnector, config: VllmConfig) -> None:
    """Otherwise the request would wait for ever."""
    ids = worker._client.chunk_ids(worker._spec, prompt(512, seed=2))
    told = step(config, StepMetadata((LoadRequest("lost", tuple(ids), 0, 512, (4, 3, 2, 1)),)))
    while not told.finished_recving:
        assert not told.invalid_block_ids
        told = step(config, StepMetadata())
    assert (told.finished_recving, told.invalid_block_ids) == ({"lost"}, {4, 3, 2, 1})


def test_a_mistake_in_counting_a_load_does_not_lose_its_end(
    worker: KVStoreConnector, config: VllmConfig
) -> None:
    broken = LoadRequest("broken", (), 256, None, (4, 3, 2, 1))  # type: ignore[arg-type]
    told = step(config, StepMetadata((broken,)))
    while not told.finished_recving:
        told = step(config, StepMetadata())
    assert (told.finished_recving, told.invalid_block_ids) == ({"broken"}, {2, 1})
    assert worker._client.metrics.snapshot()["miss_internal_error"] >= 2


def test_kv_of_an_adapter_that_the_engine_has_not_loaded_is_neither_read_nor_stored(
    worker: KVStoreConnector, config: VllmConfig, store: StoreProcess
) -> None:
    """Beside requests that have none."""
    chunks = store.stats()["chunks"]
    adapter = AdapterUse(1, AdapterFiles("/adapter", ()))
    ids = tuple(worker._client.chunk_ids(worker._spec, prompt(512, seed=4)))
    refused = LoadRequest("refused", ids, 0, 512, (4, 3, 2, 1), adapter=adapter)
    plain, other = save(worker, 5), replace(save(worker, 6), adapter=adapter)
    told = step(config, StepMetadata((refused,), (other, plain)))
    assert (told.finished_recving, told.invalid_block_ids) == ({"refused"}, {4, 3, 2, 1})
    worker._client.store.flush()
    assert store.stats()["chunks"] == chunks + 2
    counts = worker._client.metrics.snapshot()
    assert (counts["miss_adapter_pending"], counts["miss_store_adapter_pending"]) == (1, 1)


def test_only_a_step_that_computes_nothing_waits_for_loads(
    worker: KVStoreConnector, config: VllmConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert worker._worker is not None
    limits_s: list[float] = []
    monkeypatch.setattr(worker._worker._loads, "wait", limits_s.append)
    step(config, StepMetadata(computes=True))
    assert limits_s == []
    step(config, StepMetadata())
    assert len(limits_s) == 1


def test_the_engine_does_not_pause_while_it_waits_for_copies(
    worker: KVStoreConnector, config: VllmConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the chunks that are encoded in a pause would be encoded beside its next tokens."""
    assert worker._worker is not None
    saves, links = worker._worker._saves, worker._client.links
    read_layer, computing = saves._read_layer, set()

    def watched(*args: Any) -> tuple[torch.Tensor, torch.Tensor]:
        computing.add(links.is_computing)
        return read_layer(*args)

    monkeypatch.setattr(saves, "_read_layer", watched)
    step(config, StepMetadata(saves=(save(worker, 7),), computes=True))
    assert computing == {True}
    assert not links.is_computing


@pytest.fixture
def in_step_with_others(config: VllmConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config.parallel_config, "data_parallel_size", 2)


@pytest.mark.usefixtures("in_step_with_others")
def test_a_rank_whose_loads_are_under_way_keeps_no_other_rank_waiting(
    worker: KVStoreConnector, config: VllmConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert worker._worker is not None
    limits_s: list[float] = []
    monkeypatch.setattr(worker._worker._loads, "wait", limits_s.append)
    step(config, StepMetadata())
    assert limits_s == []


def test_a_reset_of_vllms_caches_reaches_the_names(config: VllmConfig, store: StoreProcess) -> None:
    scheduler = KVStoreConnector(config, KVConnectorRole.SCHEDULER, cache_config())
    half = scheduler._scheduler
    assert half is not None
    before = half._next_id(bytes(32), prompt(256, seed=3), b"")  # type: ignore[arg-type]
    assert scheduler.reset_cache()
    assert half._next_id(bytes(32), prompt(256, seed=3), b"") != before  # type: ignore[arg-type]
    scheduler.shutdown()


def test_the_client_is_closed_before_vllm_kills_the_process(worker: KVStoreConnector) -> None:
    assert worker._client.settings.timeouts.close_s < 5


@pytest.mark.parametrize("more", [{"non_causal": True}, {"attention_chunk_size": 64}])
def test_attention_that_is_not_causal_is_refused(worker: KVStoreConnector, more: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedEngineError, match="causal"):
        require_cache(cache_config(**more), worker._spec)
