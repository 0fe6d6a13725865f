"""What a job over pages is and how it ends."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import takewhile
from typing import NewType

JobId = NewType("JobId", int)
"""Names one job of one `PageStore`; never used twice."""


class Operation(StrEnum):
    """What a job does with its pages."""

    EXISTS = "exists"
    GET = "get"
    PUT = "put"


@dataclass(frozen=True, slots=True)
class PageResult:
    """How a job ended, page by page."""

    ok: tuple[bool, ...]
    """One per key, in order: the page belongs to the leading run of stored pages (`exists`), is in its view (`get`), or
    is stored on one node at least (`put`)."""
    reasons: Mapping[str, int] = field(default_factory=dict)
    """Why the other pages are not ok: pages by reason (`docs/pages.md` lists the reasons)."""

    @property
    def run(self) -> int:
        """Length of the leading run of pages that are ok."""
        return sum(1 for _ in takewhile(bool, self.ok))

    @classmethod
    def of(cls, outcomes: Iterable[str | None]) -> PageResult:
        """`outcomes` has one entry per page: None for one that is ok, else the reason."""
        outcomes = list(outcomes)
        reasons = Counter(outcome for outcome in outcomes if outcome is not None)
        return cls(tuple(outcome is None for outcome in outcomes), dict(reasons))

    @classmethod
    def failed(cls, pages: int, reason: str) -> PageResult:
        """No page is ok, all for the same reason."""
        return cls((False,) * pages, {reason: pages})
