"""When each stage of a fetch worked: spans for pictures and tables."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

Stage = Literal["lookup", "receive", "decode", "restore", "compute", "wait"]


@dataclass(frozen=True, slots=True)
class Span:
    stage: Stage
    start_s: float
    """Seconds since the timeline began."""
    end_s: float
    label: str


class Timeline:
    """Spans of one request, recorded from any thread."""

    def __init__(self) -> None:
        self._origin = time.perf_counter()
        self._lock = threading.Lock()
        self._spans: list[Span] = []

    def now_s(self) -> float:
        return time.perf_counter() - self._origin

    def add(self, stage: Stage, start_s: float, end_s: float, label: str = "") -> None:
        with self._lock:
            self._spans.append(Span(stage, start_s, end_s, label))

    @contextmanager
    def span(self, stage: Stage, label: str = "") -> Iterator[None]:
        start_s = self.now_s()
        try:
            yield
        finally:
            self.add(stage, start_s, self.now_s(), label)

    @property
    def spans(self) -> tuple[Span, ...]:
        """All spans so far, by start."""
        with self._lock:
            return tuple(sorted(self._spans, key=lambda span: span.start_s))
