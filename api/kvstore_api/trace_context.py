"""W3C Trace Context: which trace and span a request belongs to (https://www.w3.org/TR/trace-context/)."""

import re
import secrets
from dataclasses import dataclass

HEADER = "traceparent"
"""Name of the metadata that carries it over gRPC."""
_TRACEPARENT = re.compile(r"00-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})")
_SAMPLED = 1


@dataclass(frozen=True, slots=True)
class TraceContext:
    """A span of a trace that is recorded. Both ids are positive, of 128 and 64 bits."""

    trace_id: int
    span_id: int

    @classmethod
    def new(cls) -> "TraceContext":
        """The first span of a new trace."""
        return cls(secrets.randbits(128) | 1, secrets.randbits(64) | 1)

    def child(self) -> "TraceContext":
        """Another span of the same trace."""
        return TraceContext(self.trace_id, secrets.randbits(64) | 1)

    def __str__(self) -> str:
        return f"00-{self.trace_id:032x}-{self.span_id:016x}-01"

    @classmethod
    def parse(cls, text: str) -> "TraceContext | None":
        """Reads a `traceparent`. None for other text, and for a trace that is not recorded."""
        match = _TRACEPARENT.fullmatch(text)
        if match is None or not int(match[3], 16) & _SAMPLED:
            return None
        trace_id, span_id = int(match[1], 16), int(match[2], 16)
        return cls(trace_id, span_id) if trace_id and span_id else None
