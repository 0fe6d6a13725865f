"""The trace of one request: its spans, made from the request's timeline when it has ended."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

from kvstore_api.trace_context import HEADER, TraceContext
from kvstore_client.otlp import Attributes, FinishedSpan, SpanExporter, engine_context
from kvstore_client.settings.tracing import TracingSettings
from kvstore_client.spans import Fact, Mark, Stage, StageWork
from kvstore_client.timeline import Timeline

LOOKUP_CONTEXT: ContextVar[TraceContext | None] = ContextVar("kvstore_lookup_context", default=None)
"""The lookup that the current thread makes, for the nodes that it asks."""

_MOST_MARKS = 64


@dataclass(frozen=True, slots=True)
class RequestTrace:
    """Where the spans of a request belong. Spans that other processes continue are named in advance."""

    root: TraceContext
    parent: TraceContext | None
    """The engine's span. None if the request begins the trace."""
    begin_unix_ns: int
    lookup: TraceContext
    receive: TraceContext


class TracedTimeline(Timeline):
    """A timeline that becomes a trace."""

    def __init__(self) -> None:
        super().__init__()
        parent = engine_context()
        root = TraceContext.new() if parent is None else parent.child()
        self.trace = RequestTrace(root, parent, time.time_ns(), root.child(), root.child())


class RequestTracing:
    """Makes the timelines of requests, and exports their traces if the settings name a collector. Thread-safe. Raises
    ConfigurationError when packages are missing."""

    def __init__(self, settings: TracingSettings) -> None:
        endpoint = settings.otlp_endpoint
        self._exporter = SpanExporter(endpoint, "kvstore-client") if endpoint else None

    def timeline(self) -> Timeline:
        """A timeline for a request that begins now."""
        return Timeline() if self._exporter is None else TracedTimeline()

    def export(self, timeline: Timeline, name: str, attributes: Attributes) -> None:
        """Exports the spans of a request that ends now. Without effect for a timeline that is not traced."""
        if self._exporter is not None and isinstance(timeline, TracedTimeline):
            self._exporter.export(_spans(timeline, name, attributes))

    def close(self) -> None:
        if self._exporter is not None:
            self._exporter.close()


@contextmanager
def looking_up(timeline: Timeline) -> Iterator[None]:
    """The lookup of a request, in this thread."""
    if not isinstance(timeline, TracedTimeline):
        with timeline.span("lookup"):
            yield
        return
    LOOKUP_CONTEXT.set(timeline.trace.lookup)
    try:
        with timeline.span("lookup"):
            yield
    finally:
        LOOKUP_CONTEXT.set(None)


def lookup_metadata() -> list[tuple[str, str]] | None:
    """Metadata of a call to a node by which the node's span belongs to the lookup of this thread."""
    context = LOOKUP_CONTEXT.get()
    return None if context is None else [(HEADER, str(context))]


def read_traceparent(timeline: Timeline) -> str:
    """What a read of a fetch tells a node of the trace that it belongs to. Empty: it belongs to none."""
    return str(timeline.trace.receive) if isinstance(timeline, TracedTimeline) else ""


def frames_traceparent(timeline: Timeline | None) -> str:
    """The same for a read of single frames, which belongs to no stage of its request, or to no request."""
    return str(timeline.trace.root) if isinstance(timeline, TracedTimeline) else ""


def _spans(timeline: TracedTimeline, name: str, attributes: Attributes) -> Iterator[FinishedSpan]:
    trace = timeline.trace
    named: dict[Stage, TraceContext] = {"lookup": trace.lookup, "receive": trace.receive}
    begin_ns = trace.begin_unix_ns
    for stage, work in timeline.work().items():
        yield FinishedSpan(
            f"kvstore.{stage}",
            named.get(stage) or trace.root.child(),
            trace.root,
            begin_ns + round(1e9 * work.start_s),
            begin_ns + round(1e9 * work.end_s),
            "client" if stage in named else "internal",
            _about(work),
        )
    yield FinishedSpan(
        name,
        trace.root,
        trace.parent,
        begin_ns,
        begin_ns + round(1e9 * timeline.now_s()),
        attributes=attributes,
        events=tuple(_event(mark, begin_ns) for mark in timeline.marks[:_MOST_MARKS]),
    )


def _about(work: StageWork) -> Attributes:
    """Of the work of a stage, which may have pauses and several threads: for how long it worked, and on what."""
    facts: dict[str, str | int | float | bool] = {
        "kvstore.busy_s": work.busy_s,
        "kvstore.pieces": work.pieces,
    }
    if work.chunks:
        facts["kvstore.chunks"] = work.chunks
    if work.encodings:
        facts["kvstore.encodings"] = ",".join(work.encodings)
    return facts


def _event(mark: Mark, begin_ns: int) -> tuple[str, int, Attributes]:
    facts: dict[str, Fact] = {"label": mark.label or None, **mark.facts}
    known = {name: fact for name, fact in facts.items() if fact is not None}
    return mark.name, begin_ns + round(1e9 * mark.at_s), known
