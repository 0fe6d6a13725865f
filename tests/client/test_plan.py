"""Reads come in the order in which an engine needs them, and cover every frame once."""

from kvstore_client.fetch.plan import RANGE_BYTES, plan_reads
from tests.client.chunks import MEMBER, stored_chunks


def test_first_layers_of_all_chunks_come_before_second_layers_of_any() -> None:
    tasks = plan_reads(stored_chunks(3))[MEMBER]
    assert [(task.layers.start, task.chunk_index) for task in tasks] == [
        (layer, chunk) for layer in (0, 4) for chunk in range(3)
    ]


def test_every_frame_is_read_once_into_its_place() -> None:
    chunks = stored_chunks(2)
    seen = set()
    for task in plan_reads(chunks)[MEMBER]:
        for frame in range(task.first_frame, task.first_frame + task.frame_count):
            seen.add((task.chunk_index, frame))
        assert task.tokens.start >= 256 * task.chunk_index
        assert task.tokens.stop - task.tokens.start == 64 * task.frame_count
        assert task.size_bytes <= RANGE_BYTES
    assert seen == {
        (chunk, frame) for chunk in range(2) for frame in range(chunks[0].header.geometry.frame_count)
    }


def test_nothing_is_planned_for_nothing() -> None:
    assert plan_reads([]) == {}
