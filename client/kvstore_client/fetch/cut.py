"""Splits a chunk into reads: neighbouring frames of one period, first layers first."""

from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterable, Sequence

from kvstore_client.fetch.base import ReadTask
from kvstore_client.match import StoredChunk, Variant

RANGE_BYTES = 1 << 20
"""Neighbouring frames are read together up to this size: a range then arrives as one message, unsplit."""

SlotsOf = Callable[[Variant, range], Sequence[int]]
"""Maps a variant and the layers of one of its periods to the slots that are read, in order."""


def cut(
    index: int,
    chunk: StoredChunk,
    variant: Variant,
    slots_of: SlotsOf,
    first_layer: int = 0,
    end_layer: int | None = None,
) -> deque[ReadTask]:
    """Reads of a chunk's layers from `first_layer` on, which begins a period of the variant, up to `end_layer`, which
    begins another one (None: all further layers). Only the frames in `slots_of`."""
    tasks: deque[ReadTask] = deque()
    for period, layers in _periods(variant, first_layer, end_layer):
        tasks += cut_period(index, chunk, variant, period, slots_of(variant, layers))
    return tasks


def cut_period(
    index: int, chunk: StoredChunk, variant: Variant, period: int, slots: Sequence[int]
) -> list[ReadTask]:
    """Reads of the frames of one period in these slots."""
    tasks: list[ReadTask] = []
    for run in _runs(slots):
        tasks += _ranges(index, chunk, variant, period, run)
    return tasks


def by_layers(task: ReadTask) -> tuple[int, int, int]:
    """Sort key of the order in which an engine that follows layer by layer needs reads."""
    return task.layers.start, task.chunk_index, task.first_frame


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


def size_of(variant: Variant, slots_of: SlotsOf, first_layer: int = 0) -> tuple[int, int] | None:
    """Size of the reads of a variant's layers from `first_layer` on: bytes, and tokens summed over these layers. None
    when no period begins there."""
    header = variant.header
    geometry = header.geometry
    if first_layer % geometry.period_layers and first_layer < geometry.layers:
        return None
    size_bytes = token_layers = 0
    for period, layers in _periods(variant, first_layer):
        for run in _runs(slots_of(variant, layers)):
            size_bytes += header.range_bytes(period * geometry.frames_per_period + run.start, len(run))[1]
            tokens = geometry.tokens_of(run[-1]).stop - geometry.tokens_of(run[0]).start
            token_layers += tokens * len(layers)
    return size_bytes, token_layers


def _start(piece: range) -> int:
    return piece.start


def _periods(variant: Variant, first_layer: int, end_layer: int | None = None) -> Iterable[tuple[int, range]]:
    geometry = variant.header.geometry
    layers = range(first_layer, geometry.layers if end_layer is None else end_layer)
    first, end = (-(-layer // geometry.period_layers) for layer in (layers.start, layers.stop))
    for period in range(first, end):
        yield period, geometry.layers_of(period)


def _runs(slots: Sequence[int]) -> list[range]:
    """Group contiguous slots."""
    if isinstance(slots, range):  # all of a period, in most fetches
        return [slots]
    return joined(map(range, slots, (slot + 1 for slot in slots)))


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
