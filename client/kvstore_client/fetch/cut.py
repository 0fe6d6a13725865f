"""Cutting a chunk into reads: neighbouring frames of one period, the first layers first."""

from collections import deque

from kvstore_client.fetch.base import ReadTask
from kvstore_client.lookup import StoredChunk, Variant

RANGE_BYTES = 1 << 20
"""Neighbouring frames are asked for together up to this size: a range then arrives as one message, unsplit."""


def cut(index: int, chunk: StoredChunk, variant: Variant, first_layer: int = 0) -> deque[ReadTask]:
    """The reads that bring a chunk's layers from `first_layer` on, with which one of the variant's periods begins."""
    geometry = variant.header.geometry
    tasks: deque[ReadTask] = deque()
    for period in range(first_layer // geometry.period_layers, geometry.periods):
        tasks += _ranges(index, chunk, variant, period)
    return tasks


def bytes_from(variant: Variant, first_layer: int) -> int | None:
    """Bytes of a variant's layers from `first_layer` on; None when no period begins there."""
    header = variant.header
    geometry = header.geometry
    period, inside = divmod(first_layer, geometry.period_layers)
    if inside:
        return None
    first = period * geometry.frames_per_period
    return header.range_bytes(first, geometry.frame_count - first)[1]


def _ranges(index: int, chunk: StoredChunk, variant: Variant, period: int) -> list[ReadTask]:
    header = variant.header
    geometry = header.geometry
    first_of_period = period * geometry.frames_per_period
    layers = geometry.layers_of(period)
    tasks: list[ReadTask] = []
    slot = 0
    while slot < geometry.frames_per_period:
        end = slot + 1
        while (
            end < geometry.frames_per_period
            and header.range_bytes(first_of_period + slot, end + 1 - slot)[1] <= RANGE_BYTES
        ):
            end += 1
        tasks.append(
            ReadTask(
                index,
                chunk,
                variant,
                first_of_period + slot,
                end - slot,
                slice(layers.start, layers.stop),
                slice(
                    chunk.first_token + geometry.tokens_of(slot).start,
                    chunk.first_token + geometry.tokens_of(end - 1).stop,
                ),
            )
        )
        slot = end
    return tasks
