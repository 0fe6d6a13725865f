"""Timelines: what was busy when, and the Chrome trace of it."""

import json
import pickle
import threading
from collections import defaultdict
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore_client.metrics import ClientMetrics
from kvstore_client.spans import STAGES, Stage
from kvstore_client.timeline import Timeline
from kvstore_client.trace import chrome_trace

TIMES = st.integers(0, 60)
SPANS = st.lists(st.tuples(st.sampled_from(STAGES), TIMES, TIMES).map(lambda s: (s[0], *sorted(s[1:]))))


def recorded(spans: list[tuple[Stage, int, int]]) -> Timeline:
    timeline = Timeline()
    for stage, start_s, end_s in spans:
        timeline.add(stage, start_s, end_s)
    return timeline


@given(SPANS, st.one_of(TIMES, st.just(float("inf"))))
def test_busy_is_the_union_of_spans(spans: list[tuple[Stage, int, int]], until_s: float) -> None:
    timeline = recorded(spans)
    seconds: dict[str, set[int]] = defaultdict(set)
    for stage, start_s, end_s in spans:
        seconds[stage].update(range(start_s, int(min(end_s, until_s))))
    seconds["compute"] -= seconds["wait"]
    for stage in STAGES:
        assert timeline.busy_s(stage, until_s) == len(seconds[stage])
        busy = timeline.busy(stage, until_s)
        assert all(start < end for start, end in busy)
        assert all(before[1] < after[0] for before, after in pairwise(busy))


@given(SPANS)
def test_the_work_of_a_stage_is_that_of_its_spans(spans: list[tuple[Stage, int, int]]) -> None:
    timeline = recorded(spans)
    work = timeline.work()
    assert set(work) == {stage for stage, _, _ in spans}
    for stage, found in work.items():
        of_stage = [span for span in timeline.spans if span.stage == stage]
        assert found.start_s == min(span.start_s for span in of_stage)
        assert found.end_s == max(span.end_s for span in of_stage)
        assert found.busy_s == timeline.busy_s(stage)
        assert found.pieces == len(of_stage)


def test_the_work_of_a_stage_names_chunks_once() -> None:
    timeline = Timeline()
    for chunk, encoding in ((0, "exact-raw"), (1, None), (1, "exact-raw"), (None, "exact-zstd")):
        timeline.add("decode", 0.0, 1.0, chunk=chunk, encoding=encoding)
    assert timeline.work()["decode"].chunks == 2
    assert timeline.work()["decode"].encodings == ["exact-raw", "exact-zstd"]


@given(SPANS)
def test_spans_on_one_track_of_the_trace_do_not_overlap(spans: list[tuple[Stage, int, int]]) -> None:
    events = recorded(spans).chrome_trace()["traceEvents"]
    complete = [event for event in events if event["ph"] == "X"]
    assert len(complete) == len(spans)
    names = {e["tid"]: e["args"]["name"] for e in events if e["name"] == "thread_name"}
    tracks = defaultdict(list)
    for event in complete:
        assert names[event["tid"]].split()[0] == event["cat"]
        tracks[event["tid"]].append((event["ts"], event["ts"] + event["dur"]))
    for track in tracks.values():
        track.sort()
        assert all(before[1] <= after[0] for before, after in pairwise(track))
    for stage in STAGES:  # as many tracks as spans overlap at most
        of = [(start, end) for s, start, end in spans if s == stage]
        deepest = max((sum(a <= t and (t < b or a == b == t) for a, b in of) for t, _ in of), default=0)
        assert len([name for name in names.values() if name.split()[0] == stage]) <= max(deepest, bool(of))


def test_a_trace_says_what_was_worked_on_and_why() -> None:
    timeline = Timeline()
    timeline.add("receive", 0.0015, 0.004, "chunk 3 layers 0-3", chunk=3, encoding="exact-zstd")
    timeline.mark(
        "replan", "slower", bandwidth_Bps=6.25e6, computed=4, encodings="exact-zstd", limit=float("inf")
    )
    trace = json.loads(json.dumps(timeline.chrome_trace(), allow_nan=False))
    (span,) = [event for event in trace["traceEvents"] if event["ph"] == "X"]
    assert (span["ts"], span["dur"], span["name"]) == (1500.0, 2500.0, "chunk 3 layers 0-3")
    assert span["args"] == {"chunk": 3, "encoding": "exact-zstd"}
    (mark,) = [event for event in trace["traceEvents"] if event["ph"] == "i"]
    assert mark["name"] == "replan: slower"
    assert mark["args"] == {
        "bandwidth_Bps": 6.25e6, "computed": 4, "encodings": "exact-zstd", "limit": "inf"
    }  # fmt: skip


def test_several_requests_are_several_processes_of_one_trace() -> None:
    trace = chrome_trace({"first": recorded([("decode", 0, 1)]), "second": recorded([("decode", 0, 2)])})
    named = {e["pid"]: e["args"]["name"] for e in trace["traceEvents"] if e["name"] == "process_name"}
    lengths = {named[e["pid"]]: e["dur"] for e in trace["traceEvents"] if e["ph"] == "X"}
    assert lengths == {"first": 1e6, "second": 2e6}


def test_threads_record_into_one_timeline_which_can_be_sent_away() -> None:
    timeline = Timeline()

    def work() -> None:
        for chunk in range(500):
            with timeline.span("decode", "frames", chunk=chunk):
                timeline.mark("seen", chunk=chunk)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        assert timeline.busy_s("decode") <= timeline.now_s()
    copy = pickle.loads(pickle.dumps(timeline))  # noqa: S301  # our own
    assert copy.spans == timeline.spans
    assert copy.marks == timeline.marks
    assert sorted(span.chunk for span in copy.spans) == sorted(4 * list(range(500)))


def test_a_span_is_recorded_although_its_work_failed() -> None:
    timeline = Timeline()
    with pytest.raises(ValueError, match="no"), timeline.span("restore"):
        raise ValueError("no")
    assert [span.stage for span in timeline.spans] == ["restore"]


def test_metrics_of_a_fetch() -> None:
    metrics, timeline = ClientMetrics(), recorded([("receive", 0, 2), ("receive", 1, 3), ("decode", 2, 4)])
    before = {stage: prometheus("kvstore_client_stage_seconds_sum", stage=stage) for stage in STAGES}
    fetches = prometheus("kvstore_client_fetch_seconds_count")
    metrics.fetched(timeline, 4.0)
    metrics.planned(fetched=7, computed=2)
    metrics.replanned()
    after = {stage: prometheus("kvstore_client_stage_seconds_sum", stage=stage) for stage in STAGES}
    grown = {stage: after[stage] - before[stage] for stage in STAGES if after[stage] > before[stage]}
    assert grown == {"receive": 3, "decode": 2}
    assert prometheus("kvstore_client_fetch_seconds_count") == fetches + 1
    assert metrics.snapshot() == {
        "fetches": 1, "chunks_planned_fetch": 7, "chunks_planned_compute": 2, "replans": 1
    }  # fmt: skip


def prometheus(name: str, **labels: str) -> float:
    from prometheus_client import REGISTRY

    return REGISTRY.get_sample_value(name, labels) or 0.0
