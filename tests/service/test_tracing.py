"""One request is one trace, from the engine through client and node to the disk, in a real collector."""

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider

from kvstore_api.placement import Member
from kvstore_api.trace_context import TraceContext
from kvstore_api.v1 import kvstore_pb2 as pb
from kvstore_client import connect
from kvstore_client.engines.transformers import CachedModel
from kvstore_client.request_trace import RequestTracing, TracedTimeline
from kvstore_client.settings.tracing import TracingSettings
from kvstore_client.timeline import Timeline
from kvstore_cluster.arena import Arena
from kvstore_cluster.calibrations import CalibrationRegistry
from kvstore_cluster.canaries import CanaryRegistry
from kvstore_cluster.catalogue import FileCatalogue
from kvstore_cluster.coordinator import Coordinator
from kvstore_cluster.disk import SegmentStore
from kvstore_cluster.disk_times import DISK_TIMES
from kvstore_cluster.node import StorageNode
from kvstore_cluster.repair import RepairWorker
from kvstore_codec.errors import ConfigurationError
from kvstore_service.grpc_coordinator import serve_coordinator
from kvstore_service.listen import Address
from kvstore_service.peer_nodes import GrpcPeers
from kvstore_service.settings import settings_of
from kvstore_service.storage_server import StorageServer
from tests.client.models import random_prompt, tiny_model
from tests.otlp_collector import CollectedSpan, Collector

STAGES = {"kvstore.lookup", "kvstore.receive", "kvstore.decode", "kvstore.restore"}
NODE = {"kvstore.node.lookup", "kvstore.node.read", "kvstore.node.disk_read"}


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    with Collector() as collector:
        yield collector


class TracedCluster:
    """A coordinator and a node with a disk."""

    def __init__(self, folder: Path, endpoint: str | None) -> None:
        self.store = SegmentStore(folder / "disk", 256 << 20)
        self.node = StorageNode("node-0", Arena(64 << 20), store=self.store)
        repair = RepairWorker(self.node, GrpcPeers(self.node), bytes_per_s=1e9)
        self.server = StorageServer(self.node, repair, host="127.0.0.1", otlp_endpoint=endpoint)
        self.catalogue = FileCatalogue(folder)
        coordinator = Coordinator(self.catalogue)
        coordinator.join(
            Member("node-0", self.server.address, bulk_endpoint=self.server.bulk_address), incarnation=1
        )
        self.front = serve_coordinator(
            coordinator,
            CalibrationRegistry(folder / "calibrations"),
            CanaryRegistry(folder / "canaries"),
            address=Address("127.0.0.1", 0),
        )

    def put_on_disk(self) -> None:
        with self.node._lock:
            self.node._memory.demote(0.0, 0.0)

    def stop(self) -> None:
        self.front.stop(0)
        self.server.stop(0)
        self.node.close()
        self.catalogue.close()
        self.store.close()


@contextmanager
def traced(folder: Path, endpoint: str | None) -> Iterator[TracedCluster]:
    cluster = TracedCluster(folder, endpoint)
    try:
        yield cluster
    finally:
        cluster.stop()


def of_trace(spans: list[CollectedSpan], trace_id: int) -> list[CollectedSpan]:
    return [span for span in spans if span.trace_id == f"{trace_id:032x}"]


def is_whole(spans: list[CollectedSpan]) -> bool:
    return {"kvstore.generate", *STAGES, *NODE} <= {span.name for span in spans}


@pytest.mark.parametrize("scheme", ["grpc", "http"])
@pytest.mark.parametrize("bulk", [True, False])
def test_one_request_is_one_connected_trace(
    collector: Collector, tmp_path: Path, scheme: str, bulk: bool
) -> None:
    endpoint = getattr(collector, scheme)
    document, question = random_prompt(530, seed=1), random_prompt(30, seed=2)
    model = tiny_model("llama", torch.float32)
    with traced(tmp_path, endpoint) as cluster:
        routes = {} if bulk else {cluster.server.address: cluster.server.address}
        with connect(
            cluster.front.address, otlp_endpoint=endpoint, fetch_policy="fixed", routes=routes
        ) as client:
            cached = CachedModel(model, client)
            cached.generate(document, max_new_tokens=1, do_sample=False)
            client.store.flush()
            cluster.put_on_disk()
            with trace.use_span(TracerProvider().get_tracer("engine").start_span("engine")) as engine:
                cached.generate(torch.cat([document, question], 1), max_new_tokens=1, do_sample=False)
            assert cached.last_report.reused_tokens == 512
            cached.close()
            parent = engine.get_span_context()
            collector.wait(lambda spans: is_whole(of_trace(spans, parent.trace_id)))
    spans = of_trace(collector.spans, parent.trace_id)  # also what was sent at the end
    by_id = {span.span_id: span for span in spans}
    (root,) = (span for span in spans if span.name == "kvstore.generate")
    assert root.parent_id == f"{parent.span_id:016x}"
    parents = {(span.name, by_id[span.parent_id].name) for span in spans if span is not root}
    assert {(stage, "kvstore.generate") for stage in STAGES} <= parents
    assert {(name, above) for name, above in parents if name in NODE} == {
        ("kvstore.node.lookup", "kvstore.lookup"),
        ("kvstore.node.read", "kvstore.receive"),
        ("kvstore.node.disk_read", "kvstore.node.read"),
        ("kvstore.node.disk_read", "kvstore.node.lookup"),  # of the chunks' headers
    }
    assert {span.service for span in spans if span.name in NODE} == {"kvstore-node"}
    assert {span.instance for span in spans if span.name in NODE} == {"node-0"}
    for span in spans:
        assert root.start_ns <= span.start_ns <= span.end_ns <= root.end_ns
    (read,) = (span for span in spans if span.name == "kvstore.node.read")
    assert read.attributes["kvstore.transport"] == ("bulk" if bulk else "grpc")
    assert root.attributes == {"kvstore.prompt_tokens": 560, "kvstore.reused_tokens": 512}
    disk = [span for span in spans if span.name == "kvstore.node.disk_read"]
    assert all(span.attributes["kvstore.bytes"] > 0 for span in disk)


def test_reads_of_single_frames_belong_to_the_trace(collector: Collector, tmp_path: Path) -> None:
    document, question = random_prompt(1024, seed=1), random_prompt(30, seed=2)
    with (
        traced(tmp_path, collector.grpc) as cluster,
        connect(cluster.front.address, otlp_endpoint=collector.grpc, fetch_policy="fixed") as client,
    ):
        cached = CachedModel(tiny_model("llama", torch.float32), client)
        cached.generate(document, budget=0.5, max_new_tokens=1, do_sample=False)
        client.store.flush()
        cluster.put_on_disk()
        prompt = torch.cat([document, question], 1)
        with trace.use_span(TracerProvider().get_tracer("engine").start_span("engine")) as engine:
            cached.generate(prompt, budget=0.5, max_new_tokens=1, do_sample=False)
        assert cached.last_report.reprefill is not None
        periods = len(cached.last_report.reprefill.sets)
        cached.close()
    trace_id = engine.get_span_context().trace_id
    spans = of_trace(collector.spans, trace_id)  # all are sent when client and nodes have ended
    (root,) = (span for span in spans if span.name == "kvstore.generate")
    reads = {span.span_id for span in spans if span.name == "kvstore.node.read"}
    assert len(reads) == periods
    assert {span.parent_id for span in spans if span.span_id in reads} == {root.span_id}
    disk = [span for span in spans if span.name == "kvstore.node.disk_read" and span.parent_id in reads]
    assert len(disk) == periods


def test_without_a_collector_nothing_is_traced_and_nodes_get_no_context(tmp_path: Path) -> None:
    tracing = RequestTracing(TracingSettings())
    assert type(tracing.timeline()) is Timeline
    tracing.export(tracing.timeline(), "nothing", {})
    tracing.close()
    assert DISK_TIMES.get() is None


@pytest.mark.slow
def test_a_collector_that_is_away_costs_nothing_but_the_trace(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:  # accepts, and never answers
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
        tracing = RequestTracing(TracingSettings(otlp_endpoint=endpoint))
        for _ in range(2000):
            tracing.export(tracing.timeline(), "lost", {})
        tracing.close()


def test_a_timeline_that_is_not_traced_is_not_exported(collector: Collector) -> None:
    tracing = RequestTracing(TracingSettings(otlp_endpoint=collector.grpc))
    collector.clear()
    tracing.export(Timeline(), "untraced", {})
    timeline = tracing.timeline()
    assert isinstance(timeline, TracedTimeline)
    timeline.mark("replan", "slower", bandwidth_Bps=1.0, nothing=None)
    tracing.export(timeline, "traced", {"a": 1})
    tracing.close()
    (span,) = collector.wait(bool)
    assert (span.name, span.parent_id, span.attributes, span.events) == ("traced", "", {"a": 1}, ["replan"])


@pytest.mark.parametrize("endpoint", ["127.0.0.1:4317", "grpc://host", "ftp://host:1", "http://", "x"])
def test_an_address_that_is_none_is_refused(endpoint: str) -> None:
    with pytest.raises(ConfigurationError, match="write grpc://host:4317"):
        connect("127.0.0.1:1", otlp_endpoint=endpoint)
    with pytest.raises(ConfigurationError, match="write grpc://host:4317"):
        settings_of(otlp_endpoint=endpoint)


def test_only_a_recorded_trace_is_continued() -> None:
    context = TraceContext.new().child()
    assert TraceContext.parse(str(context)) == context
    text = str(context)
    for wrong in (
        "",
        text[:-2] + "00",
        text + "0",
        text.upper(),
        "01" + text[2:],
        f"00-{'0' * 32}-{'1' * 16}-01",
    ):
        assert TraceContext.parse(wrong) is None
    assert TraceContext.parse(text[:-2] + "03") == context


def test_a_hostile_context_has_no_effect(collector: Collector, tmp_path: Path) -> None:
    with traced(tmp_path, collector.grpc) as cluster:
        tracing = cluster.server._tracing
        assert tracing is not None
        for text in ("\0" * 10_000, "00-zz-01", "ä"):
            with tracing.read(pb.ReadRequest(traceparent=text), "bulk"):
                assert DISK_TIMES.get() is None
