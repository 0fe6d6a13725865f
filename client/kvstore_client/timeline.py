"""Timeline of a request: spans of each stage and marks of decisions, for traces, tables and charts."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from kvstore_client.request_id import current_request_id
from kvstore_client.spans import Fact, Mark, Span, Stage, StageWork
from kvstore_client.trace import chrome_trace

_Record = tuple[Stage, float, float, str, int | None, str | None]
"""The fields of a Span."""


class Timeline:
    """Spans and marks of one request, recorded from any thread. Can be pickled.

    Recording is one append to a list, which needs no lock in CPython; objects are created when the timeline is read.
    """

    def __init__(self) -> None:
        self._origin = time.perf_counter()
        self.request_id = current_request_id()
        """The request that it is of. Empty: none was begun."""
        self._spans: list[_Record] = []
        self._marks: list[tuple[str, float, str, dict[str, Fact]]] = []

    def now_s(self) -> float:
        return time.perf_counter() - self._origin

    def add(
        self,
        stage: Stage,
        start_s: float,
        end_s: float,
        label: str = "",
        *,
        chunk: int | None = None,
        encoding: str | None = None,
    ) -> None:
        self._spans.append((stage, start_s, end_s, label, chunk, encoding))

    @contextmanager
    def span(
        self, stage: Stage, label: str = "", *, chunk: int | None = None, encoding: str | None = None
    ) -> Iterator[None]:
        start_s = self.now_s()
        try:
            yield
        finally:
            self.add(stage, start_s, self.now_s(), label, chunk=chunk, encoding=encoding)

    def mark(self, name: str, label: str = "", **facts: Fact) -> None:
        """Record an event now, such as "replan"."""
        self._marks.append((name, self.now_s(), label, facts))

    @property
    def spans(self) -> tuple[Span, ...]:
        """All spans so far, ordered by start."""
        return tuple(Span(*record) for record in sorted(self._spans, key=lambda record: record[1]))

    @property
    def marks(self) -> tuple[Mark, ...]:
        """All marks so far, ordered by time."""
        return tuple(Mark(*record) for record in sorted(self._marks, key=lambda record: record[1]))

    def busy(self, stage: Stage, until_s: float = float("inf")) -> list[tuple[float, float]]:
        """Disjoint intervals `(start_s, end_s)` in which a stage worked: the union of its spans, up to `until_s`. For
        "compute" the engine's waits for layers are subtracted."""
        busy = self._union(stage, until_s)
        return _without(busy, self._union("wait", until_s)) if stage == "compute" else busy

    def busy_s(self, stage: Stage, until_s: float = float("inf")) -> float:
        """Seconds in which a stage worked, independent of the number of its threads."""
        return sum(end_s - start_s for start_s, end_s in self.busy(stage, until_s))

    def work(self) -> dict[Stage, StageWork]:
        """What each stage has done so far, without the stages that have done nothing. Reads the spans once and makes no
        objects of them, because a request may have hundreds."""
        by_stage: dict[Stage, list[_Record]] = {}
        for record in tuple(self._spans):
            by_stage.setdefault(record[0], []).append(record)
        unions = {stage: _union([record[1:3] for record in records]) for stage, records in by_stage.items()}
        if "compute" in unions:
            unions["compute"] = _without(unions["compute"], unions.get("wait", []))
        return {
            stage: StageWork(
                min(record[1] for record in records),
                max(record[2] for record in records),
                sum(end_s - start_s for start_s, end_s in unions[stage]),
                len(records),
                len({record[4] for record in records} - {None}),
                sorted({encoding for record in records if (encoding := record[5]) is not None}),
            )
            for stage, records in by_stage.items()
        }

    def chrome_trace(self) -> dict[str, Any]:
        """The Chrome trace of this request, for `json.dump`; see `kvstore_client.trace`."""
        return chrome_trace({"request": self})

    def _union(self, stage: Stage, until_s: float) -> list[tuple[float, float]]:
        return _union(
            [(start_s, min(end_s, until_s)) for of, start_s, end_s, *_ in tuple(self._spans) if of == stage]
        )


def _union(spans: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Disjoint intervals, ordered, that cover the same time."""
    union: list[tuple[float, float]] = []
    for start_s, end_s in sorted(spans):
        if end_s <= start_s:
            continue
        if union and start_s <= union[-1][1]:
            union[-1] = (union[-1][0], max(union[-1][1], end_s))
        else:
            union.append((start_s, end_s))
    return union


def _without(busy: list[tuple[float, float]], holes: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Subtract `holes` from `busy`. Both are ordered and without overlaps."""
    pieces: list[tuple[float, float]] = []
    next_hole = 0
    for start_s, end_s in busy:
        while next_hole < len(holes) and holes[next_hole][1] <= start_s:
            next_hole += 1
        hole = next_hole
        while hole < len(holes) and holes[hole][0] < end_s:
            if start_s < holes[hole][0]:
                pieces.append((start_s, holes[hole][0]))
            start_s = max(start_s, holes[hole][1])
            hole += 1
        if start_s < end_s:
            pieces.append((start_s, end_s))
    return pieces
