"""A collector of OpenTelemetry traces in a process of its own: receives them over gRPC and HTTP, and lists them.

`python -m tests.otlp_collector` prints its two ports, and then a line of JSON for each span that it gets."""

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self


@dataclass(frozen=True)
class CollectedSpan:
    service: str
    instance: str
    name: str
    trace_id: str
    span_id: str
    parent_id: str
    start_ns: int
    end_ns: int
    attributes: dict[str, Any]
    events: list[str]


class Collector:
    """The process, and the spans that it has received."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.otlp_collector"], stdout=subprocess.PIPE, text=True
        )
        assert self._process.stdout is not None
        self.grpc, self.http = self._process.stdout.readline().split()
        self._lock, self._spans = threading.Lock(), list[CollectedSpan]()
        self._reading = threading.Thread(target=self._read, daemon=True)
        self._reading.start()

    @property
    def spans(self) -> list[CollectedSpan]:
        with self._lock:
            return list(self._spans)

    def wait(
        self, enough: Callable[[list[CollectedSpan]], bool], patience_s: float = 15.0
    ) -> list[CollectedSpan]:
        deadline_s = time.monotonic() + patience_s
        while not enough(spans := self.spans):
            assert time.monotonic() < deadline_s, [(span.service, span.name) for span in spans]
            time.sleep(0.02)
        return spans

    def clear(self) -> None:
        with self._lock:
            self._spans.clear()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            with self._lock:
                self._spans.append(CollectedSpan(**json.loads(line)))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.wait()
        self._reading.join()
        assert self._process.stdout is not None
        self._process.stdout.close()


def serve() -> None:
    import grpc
    from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as pb
    from opentelemetry.proto.collector.trace.v1 import trace_service_pb2_grpc as rpc

    printing = threading.Lock()

    def tell(request: pb.ExportTraceServiceRequest) -> None:
        for resource in request.resource_spans:
            about = _attributes(resource.resource.attributes)
            for scope in resource.scope_spans:
                for span in scope.spans:
                    found = {
                        "service": about["service.name"],
                        "instance": about["service.instance.id"],
                        "name": span.name,
                        "trace_id": span.trace_id.hex(),
                        "span_id": span.span_id.hex(),
                        "parent_id": span.parent_span_id.hex(),
                        "start_ns": span.start_time_unix_nano,
                        "end_ns": span.end_time_unix_nano,
                        "attributes": _attributes(span.attributes),
                        "events": [event.name for event in span.events],
                    }
                    with printing:
                        print(json.dumps(found), flush=True)

    class Service(rpc.TraceServiceServicer):
        def Export(self, request, context):  # noqa: N802
            tell(request)
            return pb.ExportTraceServiceResponse()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            data = self.rfile.read(int(self.headers["Content-Length"]))
            if self.headers.get("Content-Encoding") == "gzip":
                import gzip

                data = gzip.decompress(data)
            ok = self.path == "/v1/traces"
            if ok:
                tell(pb.ExportTraceServiceRequest.FromString(data))
            self.send_response(200 if ok else 404)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002
            pass

    server = grpc.server(ThreadPoolExecutor(2))
    rpc.add_TraceServiceServicer_to_server(Service(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    web = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    print(f"grpc://127.0.0.1:{port} http://127.0.0.1:{web.server_port}", flush=True)
    web.serve_forever()


def _attributes(pairs: Any) -> dict[str, Any]:
    return {pair.key: getattr(pair.value, pair.value.WhichOneof("value")) for pair in pairs}


if __name__ == "__main__":
    serve()
