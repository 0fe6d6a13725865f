"""Jobs over pages: operations, ids and results."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import takewhile
from typing import NewType

JobId = NewType("JobId", int)
"""Id of one job of one `PageStore`; never reused."""


class Operation(StrEnum):
    """Operation of a job on its pages."""

    EXISTS = "exists"
    GET = "get"
    PUT = "put"


@dataclass(frozen=True, slots=True)
class PageResult:
    """Result of a job, page by page."""

    ok: tuple[bool, ...]
    """One per key, in order: whether the page belongs to the leading run of stored pages (`exists`), is in its view
    (`get`), or is stored on at least one node (`put`)."""
    reasons: Mapping[str, int] = field(default_factory=dict)
    """Number of the other pages by reason (`docs/pages.md` lists the reasons)."""

    @property
    def run(self) -> int:
        """Length of the leading run of ok pages."""
        return sum(1 for _ in takewhile(bool, self.ok))

    @classmethod
    def of(cls, outcomes: Iterable[str | None]) -> PageResult:
        """Result from one entry per page: None for an ok page, else the reason."""
        outcomes = list(outcomes)
        reasons = Counter(outcome for outcome in outcomes if outcome is not None)
        return cls(tuple(outcome is None for outcome in outcomes), dict(reasons))

    @classmethod
    def failed(cls, pages: int, reason: str) -> PageResult:
        """Result without ok pages, with one reason for all."""
        return cls((False,) * pages, {reason: pages})
