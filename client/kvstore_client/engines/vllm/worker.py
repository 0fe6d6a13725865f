"""The worker's half of the connector: loads into the engine's blocks, and saves out of them."""

from collections.abc import Collection, Mapping
from typing import Any

import torch
from vllm.distributed.kv_events import BlockStored

from kvstore_client.client import KVStoreClient
from kvstore_client.engines.vllm.load_log import LoadLog
from kvstore_client.engines.vllm.loads import LoadedBlocks, Loads
from kvstore_client.engines.vllm.memory import registered_memory
from kvstore_client.engines.vllm.metadata import StepMetadata
from kvstore_client.engines.vllm.saves import Saves
from kvstore_codec.model_spec import ModelSpec


class WorkerHalf:
    """Used by the worker's thread. No method waits for the store but `close`."""

    def __init__(
        self,
        client: KVStoreClient,
        spec: ModelSpec,
        block_tokens: int,
        vllm_config: Any,
        kv_caches: Mapping[str, torch.Tensor],
    ) -> None:
        """Raises UnsupportedEngineError for a layout that is unknown."""
        self._client = client
        self.memory = memory = registered_memory(vllm_config, spec, block_tokens, kv_caches)
        self._loads = Loads(client, spec, block_tokens, lambda request: memory.destination(request.block_ids))
        self._saves = Saves(client, spec, memory.read_layer)
        self.load_log = LoadLog(client.metrics, block_tokens)

    def start_loads(self, step: StepMetadata) -> None:
        for request in step.loads:
            self.load_log.began(request)
            self._loads.start(request)

    def save(self, step: StepMetadata) -> None:
        """Copy what the step has computed. Later steps may overwrite the blocks when this returns."""
        for request in step.saves:
            self._saves.save(request)

    def ended_loads(self, finished_request_ids: Collection[str]) -> LoadedBlocks:
        """The loads that have ended since the last call. Those of requests that are gone are cancelled first."""
        self._loads.cancel(finished_request_ids)
        self.load_log.cancelled(finished_request_ids)
        ended = self._loads.ended()
        self.load_log.ended(ended)
        return ended

    def stored_events(self) -> list[BlockStored]:
        """Events of the chunks that were stored since the last call."""
        return self._saves.events.take()

    def close(self) -> None:
        self._loads.close()
        self._client.close()
