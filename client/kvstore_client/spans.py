"""What a timeline is made of: spans of work, and marks of what was decided."""

from dataclasses import dataclass, field
from typing import Literal, get_args

Stage = Literal["lookup", "plan", "receive", "decode", "restore", "compute", "wait"]
STAGES: tuple[Stage, ...] = get_args(Stage)

Fact = str | float | None
"""What JSON can say in one word."""


@dataclass(frozen=True, slots=True)
class Span:
    stage: Stage
    start_s: float
    """Seconds since the timeline began."""
    end_s: float
    label: str = ""
    chunk: int | None = None
    """Index in the prompt of the chunk that was worked on."""
    encoding: str | None = None
    """What that chunk is stored as."""


@dataclass(frozen=True, slots=True)
class Mark:
    """Something that happened at one instant, with the facts that explain it."""

    name: str
    at_s: float
    label: str = ""
    facts: dict[str, Fact] = field(default_factory=dict)
