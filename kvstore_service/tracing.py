"""Spans of a storage node, for requests that belong to a recorded trace."""

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import grpc

from kvstore_api.trace_context import HEADER, TraceContext
from kvstore_api.v1 import kvstore_pb2 as pb
from kvstore_client.otlp import Attributes, FinishedSpan, SpanExporter
from kvstore_cluster.disk_times import DISK_TIMES, DiskTimes


class NodeTracing:
    """Exports a span for each read and lookup that names a recorded trace. Thread-safe."""

    def __init__(self, endpoint: str, node_id: str) -> None:
        """Raises ConfigurationError when packages are missing."""
        self._exporter = SpanExporter(endpoint, "kvstore-node", node_id)

    @contextmanager
    def request(self, name: str, traceparent: str, attributes: Attributes) -> Iterator[None]:
        """The request that the block serves, in this thread. Its reads from disk become a span of their own."""
        parent = TraceContext.parse(traceparent)
        if parent is None:
            yield
            return
        times: DiskTimes = []
        begin_ns = time.time_ns()
        DISK_TIMES.set(times)
        try:
            yield
        finally:
            DISK_TIMES.set(None)
            context = parent.child()
            spans = [FinishedSpan(name, context, parent, begin_ns, time.time_ns(), "server", attributes)]
            if times:
                spans.append(_disk_span(times, context))
            self._exporter.export(spans)

    def read(self, request: pb.ReadRequest, transport: str) -> AbstractContextManager[None]:
        """A read of ranges, until its last byte is sent."""
        facts: Attributes = {
            "kvstore.chunks": len(request.chunks),
            "kvstore.ranges": len(request.ranges),
            "kvstore.transport": transport,
        }
        return self.request("kvstore.node.read", request.traceparent, facts)

    def close(self) -> None:
        self._exporter.close()


def traced_read(
    tracing: NodeTracing | None, request: pb.ReadRequest, transport: str
) -> AbstractContextManager[None]:
    """As `NodeTracing.read`, on a node that may export nothing."""
    return nullcontext() if tracing is None or not request.traceparent else tracing.read(request, transport)


def traceparent_of(context: grpc.ServicerContext) -> str:
    """The trace that a gRPC call belongs to. Empty: none."""
    for key, value in context.invocation_metadata():
        if key == HEADER and isinstance(value, str):
            return value
    return ""


def _disk_span(times: DiskTimes, parent: TraceContext) -> FinishedSpan:
    """One span for all reads of a request, which may overlap."""
    return FinishedSpan(
        "kvstore.node.disk_read",
        parent.child(),
        parent,
        min(begin_ns for begin_ns, _, _ in times),
        max(end_ns for _, end_ns, _ in times),
        attributes={
            "kvstore.reads": len(times),
            "kvstore.bytes": sum(size_bytes for _, _, size_bytes in times),
            "kvstore.read_s": sum(end_ns - begin_ns for begin_ns, end_ns, _ in times) / 1e9,
        },
    )
