"""The class that vLLM loads: its hooks, each handed to the half of the connector that it belongs to."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import vllm
from vllm.distributed.kv_events import BlockStored, KVCacheEvent
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1, KVConnectorRole

from kvstore_client.client import connect
from kvstore_client.engines.vllm.canary import engine_probe
from kvstore_client.engines.vllm.connector_settings import whole_number, with_defaults, yes_or_no
from kvstore_client.engines.vllm.events import EventQueue, StoredEvents, are_wanted
from kvstore_client.engines.vllm.kinds import kind_of
from kvstore_client.engines.vllm.loads import LoadedBlocks
from kvstore_client.engines.vllm.memory import PagedMemory
from kvstore_client.engines.vllm.metadata import SaveRequest, StepMetadata, WorkerMetadata
from kvstore_client.engines.vllm.naming import served_spec
from kvstore_client.engines.vllm.probe_watch import ProbeWatch
from kvstore_client.engines.vllm.prometheus import ReusePromMetrics
from kvstore_client.engines.vllm.requirements import require_cache, require_configuration
from kvstore_client.engines.vllm.scheduler import MAX_LOAD_BYTES, MAX_LOADS, LoadLimits, SchedulerHalf
from kvstore_client.engines.vllm.stats import SCHEDULER, WORKER, ReuseStats, StatsSource, stats_of
from kvstore_client.engines.vllm.versions import supported_version
from kvstore_client.engines.vllm.worker import WorkerHalf
from kvstore_client.miss_reason import MissReason
from kvstore_client.request_id import request_scope

log = logging.getLogger(__name__)

Answer = TypeVar("Answer")


class KVStoreConnector(KVConnectorBase_V1):  # type: ignore[misc]  # vLLM has no types here
    """Reuses KV of the store in vLLM, and stores what vLLM computes.

    Each process has one: the scheduler's process the scheduler's half, the worker's process the worker's. An engine
    that cannot be served is refused when it starts. Later nothing raises into the engine: what goes wrong is counted,
    and the KV is computed.
    """

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any) -> None:
        """Raises UnsupportedEngineError, UnsupportedModelError and ConfigurationError, with the reason."""
        super().__init__(vllm_config, role, kv_cache_config)
        supported_version(vllm.__version__)
        require_configuration(vllm_config)
        given = vllm_config.kv_transfer_config.kv_connector_extra_config
        settings = with_defaults(given, on_cpu=vllm_config.device_config.device_type == "cpu")
        limits = LoadLimits(
            whole_number(settings, "max_loads", MAX_LOADS),
            whole_number(settings, "max_load_bytes", MAX_LOAD_BYTES),
        )
        self._requires_canary = yes_or_no(settings, "require_canary", default=False)
        client = connect(**settings)
        kind = kind_of(client.settings.encodings)
        spec = served_spec(vllm_config.model_config, client.settings.cache_dir, kind)
        self._client, self._spec = client, spec
        self._block_tokens = require_cache(kv_cache_config, spec)
        self._scheduler: SchedulerHalf | None = None
        self._worker: WorkerHalf | None = None
        self._failed_blocks: set[int] = set()
        self._stats = StatsSource(SCHEDULER if role is KVConnectorRole.SCHEDULER else WORKER, client.metrics)
        self._events = EventQueue()
        self._probes = ProbeWatch(engine_probe(vllm_config.model_config.get_vocab_size()), self._block_tokens)
        if role is KVConnectorRole.SCHEDULER:
            self._scheduler = SchedulerHalf(
                client,
                spec,
                self._block_tokens,
                limits,
                wants_events=are_wanted(vllm_config),
                lora_config=vllm_config.lora_config,
            )
        client.prepare(spec)
        log.info("KV of %s is shared through %s", spec.model_id, client.settings.address)

    @property
    def requires_kv_delivery(self) -> bool:
        """A cache: what is not stored is computed again."""
        return False

    @property
    def memory(self) -> PagedMemory | None:
        """The registered KV memory, for tools that look into it. None in the scheduler's process."""
        return self._worker.memory if self._worker is not None else None

    # ---- called in the scheduler's process

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        if self._scheduler is None:
            return 0, False
        nothing: tuple[int | None, bool] = 0, False
        is_probe = False
        if self._guarded(is_probe, self._probes.watch, request):
            return nothing
        with request_scope(request.request_id):
            return self._guarded(nothing, self._scheduler.matched_tokens, request, num_computed_tokens)

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        if self._scheduler is not None and num_external_tokens:
            # Without a guard: the engine would wait for ever for a load that nobody begins.
            self._scheduler.allocated(request, blocks.get_block_ids()[0], num_external_tokens)

    def build_connector_meta(self, scheduler_output: Any) -> StepMetadata:
        half = self._scheduler
        if half is None:
            return StepMetadata()
        loads = half.take_loads()
        nothing: tuple[int, ...] = ()
        saves: tuple[SaveRequest, ...] = ()
        step, computes = self._guarded((0, False), half.scheduled, scheduler_output)
        return StepMetadata(
            loads,
            self._guarded(saves, half.saves, scheduler_output),
            probe_blocks=self._guarded(nothing, self._probes.computed, scheduler_output),
            generation=self._guarded(0, half.generation.current),
            step=step,
            computes=computes,
        )

    def update_connector_output(self, connector_output: Any) -> None:
        half, received = self._scheduler, connector_output.finished_recving
        if half is not None and isinstance(told := connector_output.kv_connector_worker_meta, WorkerMetadata):
            self._guarded(None, half.learn, told.news)
        if half is not None and received:
            failed = connector_output.invalid_block_ids or ()
            self._guarded(None, half.received, received, failed)
        if (events := connector_output.kv_cache_events) is not None:
            self._events.add(events.get_all_events())

    def take_events(self) -> list[KVCacheEvent]:
        return self._events.take()

    def reset_cache(self) -> bool:
        """The engine calls it when KV from before must not be used again: with new weights, and before it sleeps."""
        if self._scheduler is not None:
            self._scheduler.forget()
            self._probes.stop()
        return True

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, None]:  # noqa: ARG002
        if self._scheduler is not None:
            self._guarded(None, self._scheduler.finished, request.request_id)
            self._probes.finished(request.request_id)
        return False, None

    # ---- called in the worker's process

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """Raises UnsupportedEngineError for a layout that is unknown."""
        self._worker = WorkerHalf(
            self._client,
            self._spec,
            self._block_tokens,
            self._vllm_config,
            kv_caches,
            requires_canary=self._requires_canary,
        )

    def bind_connector_metadata(self, connector_metadata: StepMetadata) -> None:
        super().bind_connector_metadata(connector_metadata)
        if self._worker is not None:
            self._guarded(None, self._worker.step_begins, connector_metadata)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:  # noqa: ARG002
        if self._worker is not None and self.has_connector_metadata():
            self._guarded(None, self._worker.start_loads, self._get_connector_metadata())

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Loads run beside the engine: no layer waits."""

    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any) -> None:
        """KV is copied when the whole step is computed."""

    def wait_for_save(self) -> None:
        # The engine calls this also when a step has failed, and the blocks do not hold what the step should compute.
        if sys.exc_info()[0] is not None:
            return
        if self._worker is not None and self.has_connector_metadata():
            self._guarded(None, self._worker.save, self._get_connector_metadata())

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        if self._worker is None:
            return None, None
        self._guarded(None, self._worker.step_ends)
        ended = self._guarded(LoadedBlocks(), self._worker.ended_loads, finished_req_ids)
        self._failed_blocks |= ended.failed_blocks
        # Apart: a mistake in counting must not lose the end of a load, for which the engine waits.
        self._guarded(None, self._worker.log_loads, ended, finished_req_ids)
        return None, set(ended.request_ids) or None

    def build_connector_worker_meta(self) -> WorkerMetadata | None:
        news = self._guarded(None, self._worker.news) if self._worker is not None else None
        return WorkerMetadata(news) if news is not None else None

    def get_block_ids_with_load_errors(self) -> set[int]:
        failed, self._failed_blocks = self._failed_blocks, set()
        return failed

    def get_kv_connector_kv_cache_events(self) -> StoredEvents | None:
        if self._worker is None:
            return None
        nothing: list[BlockStored] = []
        events = self._guarded(nothing, self._worker.stored_events)
        return StoredEvents(events) if events else None

    # ---- called in both processes, and in the API server's

    def get_kv_connector_stats(self) -> ReuseStats | None:
        load_s = self._worker.load_log.take() if self._worker is not None else ()
        return self._guarded(None, self._stats.take, load_s)

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> ReuseStats:
        return stats_of(data)

    @classmethod
    def build_prom_metrics(
        cls,
        vllm_config: Any,
        metric_types: dict[type, type],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> ReusePromMetrics:
        return ReusePromMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)

    def shutdown(self) -> None:
        for half in (self._scheduler, self._worker):
            if half is not None:
                self._guarded(None, half.close)

    def _guarded(self, otherwise: Answer, hook: Callable[..., Answer], *args: Any) -> Answer:
        """What `hook` returns. A mistake of ours is counted and logged, and means `otherwise`."""
        try:
            return hook(*args)
        except Exception as error:
            detail = f"{hook.__name__} failed in vLLM's connector: {error}"
            self._client.metrics.missed(MissReason.INTERNAL_ERROR, detail=detail, error=error)
            return otherwise
