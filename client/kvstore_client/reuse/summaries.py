"""Key summaries of a prompt that was computed, or reused in full: questions with a budget are scored against them."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence

import torch

from kvstore_client.buffers import KVBuffers
from kvstore_client.contiguous.plan import has_windows
from kvstore_client.contiguous.summaries import ChunkSummary, SummaryShape
from kvstore_client.reuse.generated import GenerationResult
from kvstore_client.reuse.parts import SessionParts
from kvstore_client.reuse.rotation import rotated
from kvstore_codec.geometry import Geometry
from kvstore_codec.identity import CHUNK_TOKENS
from kvstore_codec.model_spec import ModelSpec

log = logging.getLogger(__name__)


def publish_summaries(
    parts: SessionParts,
    tokens: Sequence[int],
    spec: ModelSpec,
    geometries: Iterable[Geometry],
    generated: GenerationResult,
    buffers: KVBuffers | None,
) -> None:
    """Summarise the prompt's full chunks, except those whose summaries this process has, and publish the summaries.
    `geometries` are those of the stored chunks: other periods have other summaries. Reused keys are read from
    `buffers`. A failure is logged: summaries only make later questions faster."""
    decoder = parts.engine.decoder
    if decoder is None or has_windows(decoder):
        return  # nothing is chosen from such prefixes
    if any(
        window is not None for window in spec.sliding_windows
    ):  # nor these, and not all of their keys were read
        return
    summaries = parts.client.summaries
    ids = [chunk.prefix_id for chunk in parts.client.chunk_ids(spec, tokens)]
    whole = (geometry for geometry in geometries if geometry.tokens % geometry.frame_tokens == 0)
    try:
        keys = _Keys(parts, generated, buffers, len(tokens))
        for shape in {SummaryShape.of(geometry) for geometry in whole}:
            known = summaries.known(ids, shape).summaries
            made = {
                name: ChunkSummary.make(
                    [keys.of(layer, index * CHUNK_TOKENS) for layer in shape.layers], shape
                )
                for index, name in enumerate(ids)
                if name not in known and keys.has(index * CHUNK_TOKENS)
            }
            summaries.publish(spec, shape, made)
    except (RuntimeError, MemoryError) as error:
        log.warning("the keys of a prompt cannot be summarised: %s", error)


class _Keys:
    """Rotated keys of a prompt: reused ones from the buffers, computed ones from the engine's capture."""

    def __init__(
        self, parts: SessionParts, generated: GenerationResult, buffers: KVBuffers | None, tokens: int
    ) -> None:
        self._capture, self._buffers = generated.capture, buffers
        self._rotary = parts.engine.rotary(tokens)
        self._captured = self._capture.reaches(generated.tokens)

    def has(self, begin: int) -> bool:
        """Whether the keys of the chunk at position `begin` are there."""
        first = self._capture.first_token
        if begin + CHUNK_TOKENS <= first:
            return self._buffers is not None
        return begin >= first and self._captured

    def of(self, layer: int, begin: int) -> torch.Tensor:
        """Keys of a chunk, `[kv_heads, CHUNK_TOKENS, head_dim]`, in host memory."""
        place = slice(begin, begin + CHUNK_TOKENS)
        if self._buffers is not None and place.stop <= self._capture.first_token:
            return self._buffers.keys[layer, :, place]
        keys = self._capture.keys(layer, place.start, place.stop).to("cpu")
        return rotated(keys, self._rotary[layer].at(place))
