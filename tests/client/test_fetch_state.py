"""What a waiting engine is told, and when."""

import math
import threading
import time

from kvstore_client.fetch.base import ReadTask
from kvstore_client.fetch.chunk_state import ChunkState
from kvstore_client.fetch.fetch_state import FetchState
from kvstore_client.fetch.replanner import Computing, Replanner
from kvstore_client.metrics import ClientMetrics
from kvstore_client.planning import AdaptivePlanner, CodecCost, Costs, Links, PrefillCost, Profile
from kvstore_client.timeline import Timeline
from tests.client.chunks import MEMBER, SPEC, stored_chunks


def progress_of(
    chunks: int, deadline_s: float = 5.0, stall_s: float = 5.0
) -> tuple[FetchState, list[ReadTask]]:
    progress = FetchState(
        stored_chunks(chunks),
        layers=SPEC.layers,
        deadline_s=deadline_s,
        stall_s=stall_s,
        timeline=Timeline(),
    )
    return progress, progress.next_reads(MEMBER, 1 << 40)


def deliver(progress: FetchState, task: ReadTask) -> None:
    assert progress.begin_decode(task)
    progress.deliver(task)


def test_first_layers_of_all_chunks_are_read_before_second_layers_of_any() -> None:
    _, tasks = progress_of(3)
    assert [(task.layers.start, task.chunk_index) for task in tasks] == [
        (layer, chunk) for layer in (0, 4) for chunk in range(3)
    ]


def test_no_more_is_asked_for_than_wanted_but_one_read_at_least() -> None:
    progress = FetchState(stored_chunks(2), layers=SPEC.layers, deadline_s=5, stall_s=5, timeline=Timeline())
    reads = [progress.next_reads(MEMBER, 1) for _ in range(5)]
    assert list(map(len, reads)) == [1, 1, 1, 1, 0]
    progress.requeue([*reads[2], *reads[3]])
    assert progress.next_reads(MEMBER, 1 << 40) == [*reads[2], *reads[3]]


def test_a_layer_is_there_when_all_chunks_have_it() -> None:
    progress, tasks = progress_of(2, deadline_s=0.3)
    for task in tasks[:2]:
        deliver(progress, task)
    assert progress.wait_layer(0)
    assert progress.wait_layer(3)
    assert not progress.wait_layer(4)
    assert progress.report().missing == {0: "timeout", 1: "timeout"}


def test_a_missing_chunk_wakes_the_engine_at_once_and_is_computed_in_its_place() -> None:
    progress, tasks = progress_of(3)
    outcome: list[bool] = []
    engine = threading.Thread(target=lambda: outcome.append(progress.wait_layer(5)))
    engine.start()
    progress.fail_chunks([task for task in tasks if task.chunk_index == 1][:1], "checksum")
    engine.join(2)
    assert outcome == [False]
    assert not progress.begin_decode(next(task for task in tasks if task.chunk_index == 1))
    for task in tasks:
        if task.chunk_index != 1:
            deliver(progress, task)
    progress.wait()
    report = progress.report()
    assert (report.delivered, report.fetched, report.missing) == (1, 2, {1: "checksum"})
    assert not report.complete
    assert progress.next_to_compute() == (1, 2)
    progress.computed(1, 2)
    assert progress.next_to_compute() is None
    assert progress.reusable_tokens == 3 * 256
    assert progress.wait_layer(5)


def test_missing_chunks_at_the_end_are_left_to_the_last_pass() -> None:
    progress, tasks = progress_of(3)
    deliver(progress, tasks[0])
    deliver(progress, tasks[3])
    progress.fail_chunks([tasks[1], tasks[2]], "gone")
    assert progress.next_to_compute() is None
    assert progress.reusable_tokens == 256
    assert progress.wait_layer(5)


def test_a_run_waits_for_what_is_before_it() -> None:
    progress, tasks = progress_of(3)
    progress.fail_chunks([tasks[1]], "gone")
    runs: list[tuple[int, int] | None] = []
    engine = threading.Thread(target=lambda: runs.append(progress.next_to_compute()))
    engine.start()
    deliver(progress, tasks[0])
    engine.join(0.1)
    assert not runs
    deliver(progress, tasks[3])
    engine.join(2)
    assert runs == [(1, 2)]


def test_who_waits_to_be_ready_is_told_once() -> None:
    progress, tasks = progress_of(2)
    told: list[int] = []
    progress.on_ready(lambda: told.append(1))
    for task in tasks:
        assert not told
        deliver(progress, task)
    progress.on_ready(lambda: told.append(2))
    progress.end("cancelled")
    assert told == [1, 2]


def test_a_fetch_that_receives_nothing_is_given_up_as_stalled() -> None:
    progress, tasks = progress_of(1, deadline_s=60, stall_s=0.2)
    deliver(progress, tasks[0])
    started = time.monotonic()
    assert not progress.wait_layer(5)
    assert time.monotonic() - started < 5
    assert progress.report().missing == {0: "stalled"}
    assert progress.next_to_compute() is None
    assert progress.reusable_tokens == 0


def test_end_frees_the_engine_and_tells_those_who_asked() -> None:
    progress, _ = progress_of(1)
    told: list[str] = []
    progress.on_end(lambda: told.append("before"))
    outcome: list[bool] = []
    engine = threading.Thread(target=lambda: outcome.append(progress.wait_layer(0)))
    engine.start()
    progress.end("cancelled")
    engine.join(2)
    progress.on_end(lambda: told.append("after"))
    assert outcome == [False]
    assert told == ["before", "after"]
    assert progress.report().missing == {0: "cancelled"}


def test_everything_delivered_is_complete_even_when_ended_afterwards() -> None:
    progress, tasks = progress_of(2)
    for task in tasks:
        deliver(progress, task)
    progress.end("cancelled")
    assert progress.report().complete
    assert progress.report().missing == {}


def test_the_last_pass_waits_until_nobody_writes_where_it_will() -> None:
    progress, tasks = progress_of(2)
    for task in tasks:
        if task.chunk_index == 0:
            deliver(progress, task)
    writing = next(task for task in tasks if task.chunk_index == 1)
    assert progress.begin_decode(writing)
    progress.fail_chunks([writing], "gone")
    passes: list[object] = []
    engine = threading.Thread(target=lambda: passes.append(progress.next_to_compute()))
    engine.start()
    engine.join(0.1)
    assert not passes
    progress.deliver(writing)
    engine.join(2)
    assert passes == [None]
    assert progress.reusable_tokens == 256


def test_an_engine_whose_patience_ends_lets_the_decoder_come_to_its_end() -> None:
    progress, tasks = progress_of(3, deadline_s=0.1)
    for task in tasks:
        if task.chunk_index == 2:
            deliver(progress, task)
    progress.fail_chunks([tasks[1]], "gone")
    assert progress.begin_decode(tasks[0])
    runs: list[object] = []
    engine = threading.Thread(target=lambda: runs.append(progress.next_to_compute()))
    engine.start()
    time.sleep(0.3)
    assert not runs
    progress.deliver(tasks[0])
    engine.join(2)
    assert runs == [(0, 2)]


def test_a_fetch_that_nobody_waits_for_loses_patience_too() -> None:
    progress, _ = progress_of(1, stall_s=0.1)
    told: list[str] = []
    progress.on_ready(lambda: told.append("ready"))
    progress.check_stall()
    assert not told
    time.sleep(0.15)
    progress.check_stall()
    assert told == ["ready"]
    assert progress.report().missing == {0: "stalled"}


def test_what_nobody_will_read_any_more_is_computed_after_a_failure() -> None:
    """The last pass has the tail, so the reader leaves; then a chunk fails, and the link has become fast."""
    chunks, links = stored_chunks(12), Links()
    (header,) = {variant.header.encoding.name for variant in chunks[0].variants}
    size_bytes = ChunkState(0, chunks[0], SPEC.layers).left_bytes(0) or 0

    def bring(bandwidth_Bps: float) -> None:  # noqa: N803
        for _ in range(60):
            links.observe(MEMBER.endpoint, int(bandwidth_Bps * 0.005), 0.005)

    bring(size_bytes / 0.15)
    profile = Profile({header: CodecCost(1e-7, 1e-8)}, PrefillCost(0.2, 0.4e-3, 0.0), 0.0, 1)
    replanner = Replanner(
        AdaptivePlanner(),
        links,
        Computing(Costs(profile), 12 * 256, 20),
        Timeline(),
        ClientMetrics(),
        replan=True,
    )
    progress = FetchState(
        chunks, layers=SPEC.layers, deadline_s=30, stall_s=2, timeline=Timeline(), replanner=replanner
    )
    tasks = progress.next_reads(MEMBER, math.inf)
    assert progress.next_to_compute() is None
    while more := progress.next_reads(MEMBER, math.inf):
        tasks += more
    assert len({task.chunk_index for task in tasks}) < 12, "the tail is computed"
    for task in tasks:
        assert progress.begin_decode(task)
    for task in tasks[:-1]:
        progress.deliver(task)
    bring(1e9)
    time.sleep(0.05)  # plans are not made more often
    progress.fail(tasks[-1], "checksum")
    assert not progress.wait_layer(SPEC.layers - 1)
    began_s = time.monotonic()
    while (run := progress.next_to_compute()) is not None:
        progress.computed(*run)
    assert progress.wait_layer(SPEC.layers - 1)
    assert time.monotonic() - began_s < 1
    assert set(progress.report().missing.values()) == {"checksum"}
