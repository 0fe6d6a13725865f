"""How long the loads of a worker took, and how much they brought."""

import time
from collections import deque
from collections.abc import Collection, Sequence

from kvstore_client.engines.vllm.loads import LoadedBlocks
from kvstore_client.engines.vllm.metadata import LoadRequest
from kvstore_client.metrics import ClientMetrics

_MOST_LOADS = 1024
"""Durations that are kept until somebody asks for them."""


class LoadLog:
    """Used by the worker's thread."""

    def __init__(self, metrics: ClientMetrics, block_tokens: int) -> None:
        self._metrics, self._block_tokens = metrics, block_tokens
        self._began: dict[str, tuple[float, LoadRequest]] = {}
        self._load_s: deque[float] = deque(maxlen=_MOST_LOADS)

    def began(self, request: LoadRequest) -> None:
        self._began[request.request_id] = time.monotonic(), request

    def cancelled(self, request_ids: Collection[str]) -> None:
        """Loads of these requests, if any, are not counted: nobody waits for them."""
        for request_id in request_ids:
            self._began.pop(request_id, None)

    def ended(self, loaded: LoadedBlocks) -> None:
        """Count loads that have ended."""
        now_s = time.monotonic()
        tokens = 0
        for request_id in loaded.request_ids & self._began.keys():
            began_s, request = self._began.pop(request_id)
            self._load_s.append(now_s - began_s)
            tokens += self._loaded_tokens(request, loaded.failed_blocks)
        if tokens:
            self._metrics.prompt(reused_tokens=tokens, computed_tokens=0)

    def take(self) -> Sequence[float]:
        """Durations of the loads that have ended since the last call, seconds."""
        load_s = tuple(self._load_s)
        self._load_s.clear()
        return load_s

    def _loaded_tokens(self, request: LoadRequest, failed_blocks: Collection[int]) -> int:
        first = request.first_token // self._block_tokens
        filled = sum(block not in failed_blocks for block in request.block_ids[first:])
        return min(filled * self._block_tokens, request.end_token - request.first_token)
