"""Splits a chunk into reads: neighbouring frames of one period, first layers first."""

from bisect import bisect_right
from collections import deque
from collections.abc import Iterable, Sequence

from kvstore_client.fetch.base import ReadTask
from kvstore_client.match import StoredChunk, Variant

RANGE_BYTES = 1 << 20
"""Neighbouring frames are read together up to this size: a range then arrives as one message, unsplit."""


def cut(
    index: int, chunk: StoredChunk, variant: Variant, first_layer: int = 0, slots: Sequence[int] | None = None
) -> deque[ReadTask]:
    """Reads of a chunk's layers from `first_layer` on, which begins a period of the variant: all frames of these
    layers, or only those in `slots`."""
    geometry = variant.header.geometry
    wanted = range(geometry.frames_per_period) if slots is None else slots
    tasks: deque[ReadTask] = deque()
    for period in range(first_layer // geometry.period_layers, geometry.periods):
        tasks += cut_period(index, chunk, variant, period, wanted)
    return tasks


def cut_period(
    index: int, chunk: StoredChunk, variant: Variant, period: int, slots: Sequence[int]
) -> list[ReadTask]:
    """Reads of the frames of one period in these slots."""
    tasks: list[ReadTask] = []
    for run in joined(map(range, slots, (slot + 1 for slot in slots))):
        tasks += _ranges(index, chunk, variant, period, run)
    return tasks


def joined(ranges: Iterable[range]) -> list[range]:
    """The same positions in order, as the fewest possible ranges."""
    found: list[range] = []
    for piece in sorted((piece for piece in ranges if piece), key=_start):
        if found and piece.start <= found[-1].stop:
            found[-1] = range(found[-1].start, max(found[-1].stop, piece.stop))
        else:
            found.append(piece)
    return found


def slots_outside(chunk: StoredChunk, variant: Variant, computed: Sequence[range]) -> list[int]:
    """Slots of a variant that are not entirely inside one of `computed`, which are `joined`."""
    geometry = variant.header.geometry
    outside: list[int] = []
    for slot in range(geometry.frames_per_period):
        tokens = geometry.tokens_of(slot)
        before = bisect_right(computed, chunk.first_token + tokens.start, key=_start) - 1
        if before < 0 or computed[before].stop < chunk.first_token + tokens.stop:
            outside.append(slot)
    return outside


def bytes_from(variant: Variant, first_layer: int) -> int | None:
    """Bytes of a variant's layers from `first_layer` on; None when no period begins there."""
    header = variant.header
    geometry = header.geometry
    period, inside = divmod(first_layer, geometry.period_layers)
    if inside:
        return None
    first = period * geometry.frames_per_period
    return header.range_bytes(first, geometry.frame_count - first)[1]


def _start(piece: range) -> int:
    return piece.start


def _ranges(index: int, chunk: StoredChunk, variant: Variant, period: int, slots: range) -> list[ReadTask]:
    header = variant.header
    geometry = header.geometry
    first_of_period = period * geometry.frames_per_period
    layers = geometry.layers_of(period)
    tasks: list[ReadTask] = []
    slot = slots.start
    while slot < slots.stop:
        end = slot + 1
        while (
            end < slots.stop and header.range_bytes(first_of_period + slot, end + 1 - slot)[1] <= RANGE_BYTES
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
