"""Timelines as Chrome trace events: open the file in https://ui.perfetto.dev or chrome://tracing.

Format: "Trace Event Format", https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU.
"""

import heapq
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

from kvstore_client.spans import STAGES, Fact, Mark, Span

_MARKS_TRACK = 0


class Recorded(Protocol):
    """Interface of a timeline."""

    @property
    def spans(self) -> Sequence[Span]:
        """Spans ordered by start."""

    @property
    def marks(self) -> Sequence[Mark]:
        """Marks ordered by time."""


def chrome_trace(timelines: Mapping[str, Recorded]) -> dict[str, Any]:
    """The trace of all timelines: each is a process, each stage a track in it. Overlapping spans of a stage with
    several threads are spread over as many tracks as needed. Times are microseconds since the timeline began."""
    events: list[dict[str, Any]] = []
    for process, (name, timeline) in enumerate(timelines.items(), start=1):
        events.append(_metadata("process_name", process, _MARKS_TRACK, name=name))
        events += _spans(process, timeline)
        events += _marks(process, timeline)
    return {"displayTimeUnit": "ms", "traceEvents": events}


def _spans(process: int, timeline: Recorded) -> Iterator[dict[str, Any]]:
    spans = timeline.spans
    track = _MARKS_TRACK
    for stage in STAGES:
        free: list[tuple[int, int]] = []
        """Time at which each track of the stage is free again, nanoseconds."""
        for span in (span for span in spans if span.stage == stage):
            start_ns, end_ns = round(span.start_s * 1e9), round(span.end_s * 1e9)
            if free and free[0][0] <= start_ns:
                _, on = heapq.heappop(free)
            else:
                on = track = track + 1
                yield _metadata(
                    "thread_name", process, on, name=f"{stage} {len(free) + 1}" if free else stage
                )
                yield _metadata("thread_sort_index", process, on, sort_index=on)
            heapq.heappush(free, (end_ns, on))
            yield {
                "ph": "X",
                "name": span.label or stage,
                "cat": stage,
                "pid": process,
                "tid": on,
                "ts": start_ns / 1000,
                "dur": (end_ns - start_ns) / 1000,
                "args": _about(span),
            }


def _marks(process: int, timeline: Recorded) -> Iterator[dict[str, Any]]:
    for mark in timeline.marks:
        yield {
            "ph": "i",
            "s": "p",  # a line through the whole process
            "name": f"{mark.name}: {mark.label}" if mark.label else mark.name,
            "cat": mark.name,
            "pid": process,
            "tid": _MARKS_TRACK,
            "ts": round(mark.at_s * 1e9) / 1000,
            "args": {name: _json(fact) for name, fact in mark.facts.items()},
        }


def _metadata(kind: str, process: int, track: int, **args: object) -> dict[str, Any]:
    return {"ph": "M", "name": kind, "pid": process, "tid": track, "args": args}


def _about(span: Span) -> dict[str, Any]:
    args = {"chunk": span.chunk, "encoding": span.encoding}
    return {name: value for name, value in args.items() if value is not None}


def _json(fact: Fact) -> Fact:
    """Facts for JSON, which cannot express an infinite bandwidth."""
    return str(fact) if isinstance(fact, float) and not math.isfinite(fact) else fact
