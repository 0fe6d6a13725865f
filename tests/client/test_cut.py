"""Reads cover every frame of a chunk once, the first layers first."""

from kvstore_client.fetch.cut import RANGE_BYTES, cut, size_of
from kvstore_client.fetch.wanted import WantedFrames
from tests.client.chunks import SPEC, stored_chunks


def test_every_frame_is_read_once_into_its_place() -> None:
    chunk = stored_chunks(2)[1]
    frames = []
    for task in cut(1, chunk, chunk.variants[0], WantedFrames(chunk).slots):
        frames += range(task.first_frame, task.first_frame + task.frame_count)
        assert task.tokens.start >= 256
        assert task.tokens.stop - task.tokens.start == 64 * task.frame_count
        assert task.size_bytes <= RANGE_BYTES
    assert frames == list(range(chunk.header.geometry.frame_count))


def test_the_rest_of_a_chunk_begins_where_a_period_does() -> None:
    chunk = stored_chunks(1)[0]
    variant, slots_of = chunk.variants[0], WantedFrames(chunk).slots
    whole, rest = (
        sum(task.size_bytes for task in cut(0, chunk, variant, slots_of, layer)) for layer in (0, 4)
    )
    assert [size_of(variant, slots_of, layer) for layer in (0, 1, 4, 6)] == [
        (whole, 6 * 256),
        None,
        (rest, 2 * 256),
        (0, 0),
    ]
    assert {task.layers.start for task in cut(0, chunk, variant, slots_of, 4)} == {4}
    assert not cut(0, chunk, variant, slots_of, 6)
    assert SPEC.layers == 6
