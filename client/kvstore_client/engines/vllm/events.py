"""KV events: which of vLLM's blocks the store holds, for routers that send a request where its KV is.

The scheduler's half describes chunks by vLLM's own block hashes when it has them saved. The worker's half passes a
description back when the chunk is stored, and vLLM publishes it beside the events of its own blocks.
"""

from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any

from vllm.distributed.kv_events import MEDIUM_STORAGE, BlockStored, KVCacheEvent, KVConnectorKVEvents
from vllm.v1.core.kv_cache_utils import maybe_convert_block_hash

from kvstore_codec.identity import CHUNK_TOKENS

_MOST_EVENTS = 1024
"""Events that wait to be taken. The oldest are dropped, as by a router's own subscription that is too slow."""


def are_wanted(vllm_config: Any) -> bool:
    """Whether the engine publishes events."""
    wanted = vllm_config.kv_events_config
    return wanted is not None and bool(wanted.enable_kv_cache_events)


def stored_events(request: Any, chunks: range, block_tokens: int) -> tuple[BlockStored, ...]:
    """The event of each of these chunks of a request, to be published when the chunk is stored. None for a request
    whose KV depends on more than its tokens: those who index by tokens would take it for that of another request."""
    if request.cache_salt or request.mm_features or request.prompt_embeds is not None or request.lora_request:
        return ()
    blocks = CHUNK_TOKENS // block_tokens
    hashes = [maybe_convert_block_hash(found) for found in request.block_hashes[: chunks.stop * blocks]]
    if len(hashes) < chunks.stop * blocks:
        return ()
    return tuple(
        BlockStored(
            block_hashes=hashes[chunk * blocks : (chunk + 1) * blocks],
            parent_block_hash=hashes[chunk * blocks - 1] if chunk else None,
            token_ids=list(request.all_token_ids[chunk * CHUNK_TOKENS : (chunk + 1) * CHUNK_TOKENS]),
            block_size=block_tokens,
            lora_id=None,
            medium=MEDIUM_STORAGE,
            lora_name=None,
            group_idx=0,
            locality="REMOTE",
        )
        for chunk in chunks
    )


class StoredEvents(KVConnectorKVEvents):  # type: ignore[misc]  # vLLM has no types here
    """Events of one worker on their way to the scheduler. The connector serves engines of one rank, so there is nothing
    to compare with those of other workers."""

    def __init__(self, events: Sequence[KVCacheEvent]) -> None:
        self._events = list(events)

    def add_events(self, events: list[KVCacheEvent]) -> None:
        self._events.extend(events)

    def aggregate(self) -> "StoredEvents":
        return self

    def increment_workers(self, count: int = 1) -> None:
        """There is one worker."""

    def get_all_events(self) -> list[KVCacheEvent]:
        return self._events

    def get_number_of_workers(self) -> int:
        return 1

    def clear_events(self) -> None:
        self._events = []


class EventQueue:
    """Events that wait to be taken, the latest ones. Thread-safe."""

    def __init__(self) -> None:
        self._events: deque[KVCacheEvent] = deque(maxlen=_MOST_EVENTS)

    def add(self, events: Sequence[KVCacheEvent]) -> None:
        self._events.extend(events)

    def add_when_stored(self, stored: "Future[int]", events: Sequence[KVCacheEvent]) -> None:
        """Add the events of a put's chunks when it has ended. None of them where one was not stored: the put does not
        say which."""
        if events:
            stored.add_done_callback(partial(self._ended, events))

    def take(self) -> list[KVCacheEvent]:
        """The events since the last call."""
        return [self._events.popleft() for _ in range(len(self._events))]

    def _ended(self, events: Sequence[KVCacheEvent], stored: "Future[int]") -> None:
        if not stored.cancelled() and stored.exception() is None and stored.result() == len(events):
            self.add(events)
