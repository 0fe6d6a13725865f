"""Saves of one worker: KV is copied out of the engine's blocks within the step, and stored behind the engine's back."""

from collections.abc import Callable
from functools import partial

import torch

from kvstore_client.buffers import KVBuffers
from kvstore_client.client import KVStoreClient
from kvstore_client.engines.vllm.before_rope import KeysBeforeRope
from kvstore_client.engines.vllm.events import EventQueue
from kvstore_client.engines.vllm.metadata import SaveRequest
from kvstore_client.miss_reason import MissReason
from kvstore_client.new_chunk import NewChunk
from kvstore_client.request_id import request_scope
from kvstore_codec.identity import CHUNK_TOKENS
from kvstore_codec.model_spec import ModelSpec

ReadLayer = Callable[[int, tuple[int, ...], int], tuple[torch.Tensor, torch.Tensor]]
"""Copies of a layer's keys and values from blocks: that many tokens, `[kv_heads, tokens, head_dim]` each."""

_BACKLOG = "chunks are not stored: those before them wait already. The service takes them too slowly, or "
_MOST_CHUNKS = 32
"""Chunks that are copied and handed over together, so that buffers have few sizes and are used again soon."""


class Saves:
    """Used by the worker's thread."""

    def __init__(
        self,
        client: KVStoreClient,
        spec: ModelSpec,
        read_layer: ReadLayer,
        before_rope: KeysBeforeRope | None = None,
    ) -> None:
        """`before_rope` is needed to store keys before RoPE."""
        self._client, self._spec, self._read_layer = client, spec, read_layer
        self._before_rope = before_rope
        self.events = EventQueue()
        """Events of chunks that were stored."""

    @torch.inference_mode()
    def save(self, request: SaveRequest) -> None:
        """Copy the KV of the request's new chunks, and have it stored. When this returns the blocks may change."""
        blocks_per_chunk = len(request.block_ids) // request.chunks
        for begin in range(0, request.chunks, _MOST_CHUNKS):
            end = min(begin + _MOST_CHUNKS, request.chunks)
            block_ids = request.block_ids[begin * blocks_per_chunk : end * blocks_per_chunk]
            with request_scope(request.request_id):
                self._save(request, request.first_chunk + begin, request.first_chunk + end, block_ids)

    def _save(self, request: SaveRequest, first: int, end: int, block_ids: tuple[int, ...]) -> None:
        tokens, client = (end - first) * CHUNK_TOKENS, self._client
        if not client.store.has_room(tokens * self._spec.kv_bytes_per_token):
            client.metrics.missed(
                MissReason.STORE_BACKLOG, detail=f"{_BACKLOG}KVSTORE_STORE_BACKLOG_BYTES is too small"
            )
            return
        buffers = client.buffers.acquire(self._spec, tokens)
        for layer in range(self._spec.layers):
            keys, values = self._read_layer(layer, block_ids, tokens)
            buffers.keys[layer].copy_(keys)
            buffers.values[layer].copy_(values)
        chunks = [
            self._chunk(request, index, buffers, (index - first) * CHUNK_TOKENS)
            for index in range(first, end)
        ]
        stored = client.store.put(self._spec, chunks, text=request.text, text_begins=request.text_begins)
        stored.add_done_callback(lambda _: client.buffers.release(buffers))
        chosen = request.events[first - request.first_chunk : end - request.first_chunk]
        self.events.add_when_stored(stored, chosen)

    def _chunk(self, request: SaveRequest, index: int, buffers: KVBuffers, first_token: int) -> NewChunk:
        """Chunk `index` of the request, whose KV begins at `first_token` of the buffers."""
        if self._before_rope is None:
            return NewChunk(
                request.chunk_id(index), partial(_part, buffers, first_token), begins_text=index == 0
            )
        begin = (index - request.first_chunk) * CHUNK_TOKENS
        tokens = request.token_ids[begin : begin + CHUNK_TOKENS]
        keys, values = _part(buffers, first_token)
        return self._before_rope.new_chunk(request.chunk_id(index), index, keys, values, tokens)


def _part(buffers: KVBuffers, first_token: int) -> tuple[torch.Tensor, torch.Tensor]:
    tokens = slice(first_token, first_token + CHUNK_TOKENS)
    return buffers.keys[:, :, tokens], buffers.values[:, :, tokens]
