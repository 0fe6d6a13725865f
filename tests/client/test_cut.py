"""Reads cover every frame of a chunk once, the first layers first."""

from kvstore_client.fetch.cut import RANGE_BYTES, bytes_from, cut
from tests.client.chunks import SPEC, stored_chunks


def test_every_frame_is_read_once_into_its_place() -> None:
    chunk = stored_chunks(2)[1]
    frames = []
    for task in cut(1, chunk, chunk.variants[0]):
        frames += range(task.first_frame, task.first_frame + task.frame_count)
        assert task.tokens.start >= 256
        assert task.tokens.stop - task.tokens.start == 64 * task.frame_count
        assert task.size_bytes <= RANGE_BYTES
    assert frames == list(range(chunk.header.geometry.frame_count))


def test_the_rest_of_a_chunk_begins_where_a_period_does() -> None:
    chunk = stored_chunks(1)[0]
    whole, rest = (
        sum(task.size_bytes for task in cut(0, chunk, chunk.variants[0], layer)) for layer in (0, 4)
    )
    assert [bytes_from(chunk.variants[0], layer) for layer in (0, 1, 4)] == [whole, None, rest]
    assert {task.layers.start for task in cut(0, chunk, chunk.variants[0], 4)} == {4}
    assert SPEC.layers == 6
