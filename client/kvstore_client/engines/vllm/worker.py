"""The worker's half of the connector: loads into the engine's blocks, and saves out of them."""

from collections.abc import Collection, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from vllm.distributed.kv_events import BlockStored

from kvstore_client.client import KVStoreClient
from kvstore_client.engines.embeddings import CheckpointEmbeddings
from kvstore_client.engines.vllm.adapter_loads import LoadedAdapters, loaded_adapters
from kvstore_client.engines.vllm.before_rope import KeysBeforeRope
from kvstore_client.engines.vllm.canary import EngineCanary, engine_probe
from kvstore_client.engines.vllm.kinds import KeyKind, kind_named, spec_of_kind
from kvstore_client.engines.vllm.load_log import LoadLog
from kvstore_client.engines.vllm.loads import LoadedBlocks, Loads
from kvstore_client.engines.vllm.memory import registered_memory
from kvstore_client.engines.vllm.metadata import AdapterUse, LoadRequest, StepMetadata
from kvstore_client.engines.vllm.naming import checkpoint_folder
from kvstore_client.engines.vllm.rotation import engine_rotation
from kvstore_client.engines.vllm.saves import Saves
from kvstore_client.engines.vllm.worker_news import News, Newsroom
from kvstore_client.miss_reason import MissReason
from kvstore_codec.model_spec import ModelSpec

_IDLE_STEP_S = 0.005
"""While requests wait for loads and nothing is computed, the engine steps without a pause. Its thread would take the
interpreter from those that decode the loads. A request that comes in the meantime waits no longer than this."""


class WorkerHalf:
    """Used by the worker's thread. No method waits for the store but `close` and `step_ends`."""

    def __init__(
        self,
        client: KVStoreClient,
        spec: ModelSpec,
        block_tokens: int,
        vllm_config: Any,
        kv_caches: Mapping[str, torch.Tensor],
        *,
        requires_canary: bool = False,
    ) -> None:
        """Raises UnsupportedEngineError for a layout or a RoPE that is unknown, and UnsupportedModelError for
        embeddings that cannot be read."""
        self._client, self._block_tokens = client, block_tokens
        self._step, self._computes = 0, False
        self._computing = ExitStack()
        # Ranks that compute in step with others (mixtures of experts) would keep them waiting.
        self._pauses = vllm_config.parallel_config.data_parallel_size == 1
        self.memory = memory = registered_memory(vllm_config, spec, block_tokens, kv_caches)
        before_rope = _before_rope(vllm_config.model_config, spec)
        self._loads = Loads(
            client, spec, block_tokens, lambda request: memory.destination(request.block_ids), before_rope
        )
        self._newsroom = Newsroom(client.links, self._loads.costs)
        self._saves = Saves(client, spec, memory.read_layer, before_rope)
        self.load_log = LoadLog(client.metrics, block_tokens)
        self._is_exact = kind_named(spec) is KeyKind.AFTER_ROPE
        self._canary = EngineCanary(
            client,
            # Keys as the engine keeps them; the canary of plain names is that of transformers workers.
            spec if self._is_exact else spec_of_kind(spec, KeyKind.AFTER_ROPE),
            engine_probe(vllm_config.model_config.get_vocab_size()),
            memory.read_layer,
            device=memory.tensors[0].device.type,
            is_required=requires_canary,
        )
        self._adapters = loaded_adapters() if vllm_config.lora_config is not None else LoadedAdapters()
        self._refused: list[LoadRequest] = []
        """Loads that were not begun."""

    def step_begins(self, step: StepMetadata) -> None:
        """Before the engine computes."""
        self._step, self._computes = step.step, step.computes
        self._computing.close()
        if step.computes:
            self._computing.enter_context(self._client.links.computing())

    def start_loads(self, step: StepMetadata) -> None:
        refused, begun = list(step.loads), []
        try:
            if step.loads and not self._is_refused(step, storing=False):
                begun = [request for request in step.loads if self._is_loaded(request.adapter, storing=False)]
                refused = [request for request in step.loads if request not in begun]
        finally:  # the engine waits for the end of each load, also where this has failed
            self._refused.extend(refused)
        for request in begun:
            self.load_log.began(request)
            self._loads.start(request)

    def save(self, step: StepMetadata) -> None:
        """Copy what the step has computed. Later steps may overwrite the blocks when this returns."""
        with self._computing:  # which ends here: while the engine waits for copies, it does not pause
            if step.probe_blocks:
                self._canary.computed(step.probe_blocks)
            if step.saves and not self._is_refused(step, storing=True):
                for request in step.saves:
                    if self._is_loaded(request.adapter, storing=True):
                        self._saves.save(request)

    def step_ends(self) -> None:
        """A step that computes nothing waits for the loads, a moment at most."""
        if self._pauses and not self._computes and not self._refused:
            self._loads.wait(_IDLE_STEP_S)

    def ended_loads(self, finished_request_ids: Collection[str]) -> LoadedBlocks:
        """The loads that have ended since the last call. Those of requests that are gone are cancelled first."""
        self._loads.cancel(finished_request_ids)
        ended = self._loads.ended()
        if not self._refused:
            return ended
        refused, self._refused = self._refused, []
        return LoadedBlocks(
            ended.request_ids.union(request.request_id for request in refused),
            ended.failed_blocks.union(
                *(request.blocks_from(request.first_token, self._block_tokens) for request in refused)
            ),
        )

    def log_loads(self, ended: LoadedBlocks, finished_request_ids: Collection[str]) -> None:
        """Count what `ended_loads` has returned for these requests."""
        self.load_log.cancelled(finished_request_ids)
        self.load_log.ended(ended)

    def stored_events(self) -> list[BlockStored]:
        """Events of the chunks that were stored since the last call."""
        return self._saves.events.take()

    def _is_refused(self, step: StepMetadata, *, storing: bool) -> bool:
        """Whether the engine may not share KV now. Counted and logged."""
        reason = self._canary.refusal(step.generation if self._is_exact else None)
        if reason is not None:
            counted = MissReason.of_canary(reason, storing=storing)
            why = f"{reason}: {self._canary.why(reason)}; KV is computed, and not shared"
            self._client.metrics.missed(counted, detail=why, cause=reason)
        return reason is not None

    def _is_loaded(self, adapter: AdapterUse | None, *, storing: bool) -> bool:
        """Whether the engine computes with the adapter that chunks are named by. If not, that is counted."""
        reason = self._adapters.why_not(adapter, storing=storing) if adapter is not None else None
        if reason is not None and adapter is not None:
            folder = adapter.files.folder
            why: str | None = None
            if reason in (MissReason.ADAPTER_CHANGED, MissReason.STORE_ADAPTER_CHANGED):
                why = f"the LoRA adapter in {folder} has changed since the engine loaded it; its KV is not shared"
            self._client.metrics.missed(reason, detail=why, cause=f"{reason} {folder}")
        return reason is None

    def news(self) -> News | None:
        """For the scheduler's half, after a step."""
        return self._newsroom.after(self._step, self._loads.take_overtaken(), computes=self._computes)

    def close(self) -> None:
        self._loads.close()
        self._client.close()


def _before_rope(model_config: Any, spec: ModelSpec) -> KeysBeforeRope | None:
    """What lossy KV needs; None where `spec` names exact KV, whose keys are kept after RoPE."""
    if spec.rope is None:
        return None
    folder = checkpoint_folder(model_config.model, model_config.revision)
    return KeysBeforeRope(
        engine_rotation(spec.rope, spec.head_dim), CheckpointEmbeddings(folder, spec.dtype.torch)
    )
