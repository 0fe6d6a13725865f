"""What a waiting engine is told, and when."""

import math
import threading
import time

from kvstore_client.fetch.base import ReadTask
from kvstore_client.fetch.fetch_state import FetchState
from kvstore_client.fetch.replanner import Computing, Replanner
from kvstore_client.metrics import ClientMetrics
from kvstore_client.planning import AdaptivePlanner, CodecCost, Costs, Links, PrefillCost, Profile
from kvstore_client.timeline import Timeline
from tests.client.chunks import MEMBER, SPEC, stored_chunks


def fetch_of(
    chunks: int, deadline_s: float = 120.0, stall_s: float = 120.0
) -> tuple[FetchState, list[ReadTask]]:
    fetch_state = FetchState(
        stored_chunks(chunks),
        layers=SPEC.layers,
        deadline_s=deadline_s,
        stall_s=stall_s,
        timeline=Timeline(),
    )
    return fetch_state, fetch_state.next_reads(MEMBER, 1 << 40)


def deliver(fetch_state: FetchState, task: ReadTask) -> None:
    assert fetch_state.begin_decode(task)
    fetch_state.deliver(task)


def test_first_layers_of_all_chunks_are_read_before_second_layers_of_any() -> None:
    _, tasks = fetch_of(3)
    assert [(task.layers.start, task.chunk_index) for task in tasks] == [
        (layer, chunk) for layer in (0, 4) for chunk in range(3)
    ]


def test_no_more_is_asked_for_than_wanted_but_one_read_at_least() -> None:
    fetch_state = FetchState(
        stored_chunks(2), layers=SPEC.layers, deadline_s=5, stall_s=5, timeline=Timeline()
    )
    reads = [fetch_state.next_reads(MEMBER, 1) for _ in range(5)]
    assert list(map(len, reads)) == [1, 1, 1, 1, 0]
    fetch_state.requeue([*reads[2], *reads[3]])
    assert fetch_state.next_reads(MEMBER, 1 << 40) == [*reads[2], *reads[3]]


def test_a_layer_is_there_when_all_chunks_have_it() -> None:
    fetch_state, tasks = fetch_of(2, deadline_s=0.3)
    for task in tasks[:2]:
        deliver(fetch_state, task)
    assert fetch_state.wait_layer(0)
    assert fetch_state.wait_layer(3)
    assert not fetch_state.wait_layer(4)
    assert fetch_state.report().missing == {0: "timeout", 1: "timeout"}


def test_a_missing_chunk_wakes_the_engine_at_once_and_is_computed_in_its_place() -> None:
    fetch_state, tasks = fetch_of(3)
    outcome: list[bool] = []
    engine = threading.Thread(target=lambda: outcome.append(fetch_state.wait_layer(5)))
    engine.start()
    fetch_state.fail_chunks([task for task in tasks if task.chunk_index == 1][:1], "checksum")
    engine.join(30)
    assert outcome == [False]
    assert not fetch_state.begin_decode(next(task for task in tasks if task.chunk_index == 1))
    for task in tasks:
        if task.chunk_index != 1:
            deliver(fetch_state, task)
    fetch_state.wait()
    report = fetch_state.report()
    assert (report.delivered, report.fetched, report.missing) == (1, 2, {1: "checksum"})
    assert not report.complete
    assert fetch_state.next_to_compute() == (1, 2)
    fetch_state.computed(1, 2)
    assert fetch_state.next_to_compute() is None
    assert fetch_state.reusable_tokens == 3 * 256
    assert fetch_state.wait_layer(5)


def test_missing_chunks_at_the_end_are_left_to_the_last_pass() -> None:
    fetch_state, tasks = fetch_of(3)
    deliver(fetch_state, tasks[0])
    deliver(fetch_state, tasks[3])
    fetch_state.fail_chunks([tasks[1], tasks[2]], "gone")
    assert fetch_state.next_to_compute() is None
    assert fetch_state.reusable_tokens == 256
    assert fetch_state.wait_layer(5)


def test_a_run_waits_for_what_is_before_it() -> None:
    fetch_state, tasks = fetch_of(3)
    fetch_state.fail_chunks([tasks[1]], "gone")
    runs: list[tuple[int, int] | None] = []
    engine = threading.Thread(target=lambda: runs.append(fetch_state.next_to_compute()))
    engine.start()
    deliver(fetch_state, tasks[0])
    engine.join(0.1)
    assert not runs
    deliver(fetch_state, tasks[3])
    engine.join(30)
    assert runs == [(1, 2)]


def test_who_waits_to_be_ready_is_told_once() -> None:
    fetch_state, tasks = fetch_of(2)
    told: list[int] = []
    fetch_state.on_ready(lambda: told.append(1))
    for task in tasks:
        assert not told
        deliver(fetch_state, task)
    fetch_state.on_ready(lambda: told.append(2))
    fetch_state.end("cancelled")
    assert told == [1, 2]


def test_a_fetch_that_receives_nothing_is_given_up_as_stalled() -> None:
    fetch_state, tasks = fetch_of(1, deadline_s=120, stall_s=0.2)
    deliver(fetch_state, tasks[0])
    started = time.monotonic()
    assert not fetch_state.wait_layer(5)
    assert time.monotonic() - started < 60
    assert fetch_state.report().missing == {0: "stalled"}
    assert fetch_state.next_to_compute() is None
    assert fetch_state.reusable_tokens == 0


def test_end_frees_the_engine_and_tells_those_who_asked() -> None:
    fetch_state, _ = fetch_of(1)
    told: list[str] = []
    fetch_state.on_end(lambda: told.append("before"))
    outcome: list[bool] = []
    engine = threading.Thread(target=lambda: outcome.append(fetch_state.wait_layer(0)))
    engine.start()
    fetch_state.end("cancelled")
    engine.join(30)
    fetch_state.on_end(lambda: told.append("after"))
    assert outcome == [False]
    assert told == ["before", "after"]
    assert fetch_state.report().missing == {0: "cancelled"}


def test_everything_delivered_is_complete_even_when_ended_afterwards() -> None:
    fetch_state, tasks = fetch_of(2)
    for task in tasks:
        deliver(fetch_state, task)
    fetch_state.end("cancelled")
    assert fetch_state.report().complete
    assert fetch_state.report().missing == {}


def test_the_last_pass_waits_until_nobody_writes_where_it_will() -> None:
    fetch_state, tasks = fetch_of(2)
    for task in tasks:
        if task.chunk_index == 0:
            deliver(fetch_state, task)
    writing = next(task for task in tasks if task.chunk_index == 1)
    assert fetch_state.begin_decode(writing)
    fetch_state.fail_chunks([writing], "gone")
    passes: list[object] = []
    engine = threading.Thread(target=lambda: passes.append(fetch_state.next_to_compute()))
    engine.start()
    engine.join(0.1)
    assert not passes
    fetch_state.deliver(writing)
    engine.join(30)
    assert passes == [None]
    assert fetch_state.reusable_tokens == 256


def test_an_engine_whose_patience_ends_lets_the_decoder_come_to_its_end() -> None:
    fetch_state, tasks = fetch_of(3, deadline_s=0.1)
    for task in tasks:
        if task.chunk_index == 2:
            deliver(fetch_state, task)
    fetch_state.fail_chunks([tasks[1]], "gone")
    assert fetch_state.begin_decode(tasks[0])
    runs: list[object] = []
    engine = threading.Thread(target=lambda: runs.append(fetch_state.next_to_compute()))
    engine.start()
    time.sleep(0.3)
    assert not runs
    fetch_state.deliver(tasks[0])
    engine.join(30)
    assert runs == [(0, 2)]


def test_a_fetch_that_nobody_waits_for_loses_patience_too() -> None:
    fetch_state, _ = fetch_of(1, stall_s=60)
    told: list[str] = []
    fetch_state.on_ready(lambda: told.append("ready"))
    fetch_state.check_stall()
    assert not told
    fetch_state._last_progress -= 60
    fetch_state.check_stall()
    assert told == ["ready"]
    assert fetch_state.report().missing == {0: "stalled"}


def test_what_nobody_will_read_any_more_is_computed_after_a_failure() -> None:
    """The last pass has the tail, so the reader leaves; then a chunk fails, and the link has become fast."""
    chunks, links = stored_chunks(12), Links()
    (header,) = {variant.header.encoding.name for variant in chunks[0].variants}
    size_bytes = sum(chunks[0].header.frame_lengths)

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
    fetch_state = FetchState(
        chunks, layers=SPEC.layers, deadline_s=120, stall_s=60, timeline=Timeline(), replanner=replanner
    )
    tasks = fetch_state.next_reads(MEMBER, math.inf)
    assert fetch_state.next_to_compute() is None
    while more := fetch_state.next_reads(MEMBER, math.inf):
        tasks += more
    assert len({task.chunk_index for task in tasks}) < 12, "the tail is computed"
    for task in tasks:
        assert fetch_state.begin_decode(task)
    for task in tasks[:-1]:
        fetch_state.deliver(task)
    bring(1e9)
    time.sleep(0.05)  # plans are not made more often
    fetch_state.fail(tasks[-1], "checksum")
    assert not fetch_state.wait_layer(SPEC.layers - 1)
    began_s = time.monotonic()
    while (run := fetch_state.next_to_compute()) is not None:
        fetch_state.computed(*run)
    assert fetch_state.wait_layer(SPEC.layers - 1)
    assert time.monotonic() - began_s < 30
    assert set(fetch_state.report().missing.values()) == {"checksum"}
