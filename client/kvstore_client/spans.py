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
class StageWork:
    """All spans of a stage together. Times are seconds since the timeline began."""

    start_s: float
    end_s: float
    busy_s: float
    """How long it worked, without pauses, independent of the number of its threads. Of "compute" without the engine's
    waits for layers."""
    pieces: int
    chunks: int
    encodings: list[str]


@dataclass(frozen=True, slots=True)
class Mark:
    """An event at one instant, with the facts that explain it."""

    name: str
    at_s: float
    label: str = ""
    facts: dict[str, Fact] = field(default_factory=dict)
