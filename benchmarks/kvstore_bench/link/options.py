"""Options of the benchmark."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kvstore_bench.link.links import Shaper
from kvstore_codec.encoding import Rate


@dataclass(frozen=True, slots=True)
class Options:
    bandwidths_bps: Sequence[float]
    tokens: Sequence[int]
    policies: Sequence[str]
    shaper: Shaper = "userspace"
    jitters: Sequence[str] = ("none",)
    dtype: str = "bfloat16"
    repeats: int = 5
    floor: Rate | None = Rate.MEDIUM
    """Lowest precision that the adaptive policies may use."""
    adaptive: Mapping[str, Any] = field(default_factory=dict)
    """Further settings of the adaptive policies."""
    quick: bool = False
    """Whether a small calibration is enough, if no full one is cached."""
    trace: Path | None = None
    timeline: Path | None = None
