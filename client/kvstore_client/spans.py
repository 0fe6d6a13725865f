"""Elements of a timeline: spans of work, and marks of decisions."""

from dataclasses import dataclass, field
from typing import Literal, get_args

Stage = Literal["lookup", "plan", "receive", "decode", "restore", "compute", "wait"]
STAGES: tuple[Stage, ...] = get_args(Stage)

Fact = str | float | None
"""A JSON scalar."""


@dataclass(frozen=True, slots=True)
class Span:
    stage: Stage
    start_s: float
    """Seconds since the timeline began."""
    end_s: float
    label: str = ""
    chunk: int | None = None
    """Index of the chunk in the prompt."""
    encoding: str | None = None
    """Encoding that the chunk is stored in."""


@dataclass(frozen=True, slots=True)
class Mark:
    """An event at one instant, with the facts that explain it."""

    name: str
    at_s: float
    label: str = ""
    facts: dict[str, Fact] = field(default_factory=dict)
