"""Plan stage: the order in which frames are read.

Period-major: the first layers of all chunks come before the second layers of any, because an engine that computes
layer by layer can start as soon as the first period is there.
"""

from collections.abc import Sequence

from kvstore_api.placement import Member
from kvstore_client.fetch.base import ReadTask
from kvstore_client.lookup import StoredChunk

RANGE_BYTES = 1 << 20
"""Neighbouring frames are asked for together up to this size: a range then arrives as one message, unsplit."""


def plan_reads(chunks: Sequence[StoredChunk]) -> dict[Member, list[ReadTask]]:
    """The reads that bring `chunks`, per owner, in the order they are needed. Encodings, and with them the layers of a
    period, may differ from chunk to chunk."""
    needed = sorted(
        (chunk.header.geometry.layers_of(period).start, index, period)
        for index, chunk in enumerate(chunks)
        for period in range(chunk.header.geometry.periods)
    )
    reads: dict[Member, list[ReadTask]] = {}
    for _, index, period in needed:
        chunk = chunks[index]
        reads.setdefault(chunk.member, []).extend(_ranges(index, chunk, period))
    return reads


def _ranges(index: int, chunk: StoredChunk, period: int) -> list[ReadTask]:
    geometry, header = chunk.header.geometry, chunk.header
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
        first = chunk.first_token + geometry.tokens_of(slot).start
        last = chunk.first_token + geometry.tokens_of(end - 1).stop
        tasks.append(
            ReadTask(
                index,
                chunk,
                first_of_period + slot,
                end - slot,
                slice(layers.start, layers.stop),
                slice(first, last),
            )
        )
        slot = end
    return tasks
