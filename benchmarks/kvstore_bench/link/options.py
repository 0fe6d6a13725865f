"""What the benchmark is asked for."""

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
    adaptive: Mapping[str, Any] = field(default_factory=dict)
    """Further settings of the adaptive policies."""
    quick: bool = False
    """With a poor calibration, unless a proper one is there."""
    trace: Path | None = None
    timeline: Path | None = None
