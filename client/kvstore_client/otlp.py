"""Exports spans by OTLP, the protocol of OpenTelemetry (docs/tracing.md). Needs the extra `otel`; importing this module
does not."""

import importlib.util
import os
import socket
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal
from urllib.parse import urlsplit

from kvstore_api.trace_context import TraceContext
from kvstore_codec.errors import ConfigurationError

SpanKind = Literal["internal", "client", "server"]
Attributes = Mapping[str, str | int | float | bool]
_SCHEMES = ("grpc", "grpcs", "http", "https")
_TIMEOUT_S = 2.0
_MOST_WAITING = 4096
"""Spans that wait for the collector. Further ones are dropped."""
_DELAY_MS = 1000
_PACKAGES = ("opentelemetry.sdk", "opentelemetry.exporter.otlp.proto")


@dataclass(frozen=True, slots=True)
class FinishedSpan:
    """A span that has ended. Times are nanoseconds of unix time; `events` are name, time and attributes."""

    name: str
    context: TraceContext
    parent: TraceContext | None
    start_ns: int
    end_ns: int
    kind: SpanKind = "internal"
    attributes: Attributes = field(default_factory=dict)
    events: tuple[tuple[str, int, Attributes], ...] = ()


def check_endpoint(text: str) -> str:
    """The address of a collector, unchanged: grpc://host:port or http://host:port, or with TLS grpcs:// or https://.
    Raises ValueError."""
    parts = urlsplit(text)
    if (
        parts.scheme not in _SCHEMES
        or not parts.hostname
        or (parts.scheme.startswith("grpc") and not parts.port)
    ):
        raise ValueError("write grpc://host:4317 or http://host:4318 (with TLS grpcs:// or https://)")
    return text


def require_packages() -> None:
    """Raises ConfigurationError when packages are missing."""
    if any(map(_is_missing, _PACKAGES)):
        raise ConfigurationError("traces need OpenTelemetry: pip install 'kvstore-service[otel]'")


class SpanExporter:
    """Sends spans to a collector in the background. A collector that is slow or away costs spans, and nothing else.
    Thread-safe. Raises ConfigurationError when packages are missing."""

    def __init__(self, endpoint: str, service: str, instance: str = "") -> None:
        """`service` and `instance` are what traces call this process; the instance is by default host and pid."""
        require_packages()
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.sdk.util.instrumentation import InstrumentationScope

        instance = instance or f"{socket.gethostname()}:{os.getpid()}"
        self._resource = Resource.create({"service.name": service, "service.instance.id": instance})
        self._scope = InstrumentationScope("kvstore")
        self._processor = BatchSpanProcessor(
            _exporter(endpoint),
            max_queue_size=_MOST_WAITING,
            schedule_delay_millis=_DELAY_MS,
            export_timeout_millis=round(1000 * _TIMEOUT_S),
        )

    def export(self, spans: Iterable[FinishedSpan]) -> None:
        """Queues the spans. Takes about 15 µs for each."""
        for span in spans:
            self._processor.on_end(self._readable(span))

    def close(self) -> None:
        """Sends what waits, for about two seconds. What a slow collector has not taken then is lost."""
        ending = threading.Thread(target=self._processor.shutdown, name="kvstore-traces-end", daemon=True)
        ending.start()  # waits up to 30 s itself
        ending.join(_TIMEOUT_S)

    def _readable(self, span: FinishedSpan) -> Any:
        from opentelemetry.sdk.trace import Event, ReadableSpan
        from opentelemetry.trace import SpanKind as Kind

        return ReadableSpan(
            name=span.name,
            context=_context(span.context, is_remote=False),
            parent=None if span.parent is None else _context(span.parent, is_remote=True),
            resource=self._resource,
            attributes=dict(span.attributes),
            events=[Event(name, dict(facts), at_ns) for name, at_ns, facts in span.events],
            kind=Kind[span.kind.upper()],
            start_time=span.start_ns,
            end_time=span.end_ns,
            instrumentation_scope=self._scope,
        )


def engine_context() -> TraceContext | None:
    """The span in which the engine calls, if it uses OpenTelemetry. None also if that one is not recorded."""
    from opentelemetry.trace import get_current_span

    context = get_current_span().get_span_context()
    if not context.is_valid or not context.trace_flags.sampled:
        return None
    return TraceContext(context.trace_id, context.span_id)


def _exporter(endpoint: str) -> Any:
    parts = urlsplit(check_endpoint(endpoint))
    if parts.scheme.startswith("grpc"):
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter as OverGrpc

        return OverGrpc(endpoint=parts.netloc, insecure=parts.scheme == "grpc", timeout=_TIMEOUT_S)
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter as OverHttp

    url = endpoint if parts.path.strip("/") else f"{endpoint.rstrip('/')}/v1/traces"
    return OverHttp(endpoint=url, timeout=_TIMEOUT_S)


def _context(context: TraceContext, *, is_remote: bool) -> Any:
    from opentelemetry.trace import SpanContext, TraceFlags

    return SpanContext(context.trace_id, context.span_id, is_remote, TraceFlags(TraceFlags.SAMPLED))


def _is_missing(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is None
    except ModuleNotFoundError:
        return True
