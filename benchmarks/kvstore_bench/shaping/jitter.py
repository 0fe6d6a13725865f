"""Patterns of bandwidth over time, and playing them on a link.

A pattern is written as its kind and the parameters that differ from the defaults:

    none                                constant bandwidth
    step                                full, from 0.1 s on a twentieth for 1 s, then full again
    step:1gbit,50mbit,at=0.1s,for=2s    the same with given numbers
    saw                                 falls from full to a tenth within a second, then starts again at full
    saw:50mbit,period=0.5s              falls to 50 Mbit/s within half a second
    trace:FILE                          recorded lines of "seconds bit/s"; starts again when it ends
"""

import bisect
import itertools
import math
import re
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from kvstore_codec.errors import ConfigurationError
from kvstore_service.bandwidth import parse_bandwidth

STEP_SHARE = 1 / 20
SAW_SHARE = 1 / 10
_SAW_LEVELS = 16
_MOST_S, _LEAST_BPS, _MOST_BPS = 1e12, 1.0, 1e15
"""Limits of the numbers in a trace, within which their products and sums are exact enough."""
_SECONDS = re.compile(r"(\d+(?:\.\d+)?) ?(ms|s)")
_OPTIONS = {"step": {"at": 0.1, "for": 1.0}, "saw": {"period": 1.0}}


@dataclass(frozen=True, slots=True)
class Schedule:
    """Bandwidth of a link over time."""

    starts_s: tuple[float, ...]
    """Start times in ascending order; the first is 0."""
    bandwidths_bps: tuple[float, ...]
    """Bandwidth from each start until the next one."""
    period_s: float = math.inf
    """Time after which the schedule repeats."""

    def bandwidth_bps(self, at_s: float) -> float:
        """The bandwidth at a time since the beginning."""
        within_s = at_s % self.period_s if self.period_s < math.inf else at_s
        return self.bandwidths_bps[bisect.bisect_right(self.starts_s, within_s) - 1]

    @property
    def settles(self) -> bool:
        """Whether the schedule changes, but does not repeat. Before its first change the link is in a steady state."""
        return len(self.starts_s) > 1 and self.period_s == math.inf

    def changes(self) -> Iterator[tuple[float, float]]:
        """(seconds since the beginning, bit/s) of each change, from 0 s on. Endless if the schedule repeats."""
        round_s = 0.0
        while True:
            for start_s, bandwidth_bps in zip(self.starts_s, self.bandwidths_bps, strict=True):
                yield round_s + start_s, bandwidth_bps
            if self.period_s == math.inf:
                return
            round_s += self.period_s


class Pattern(Protocol):
    """A pattern of bandwidth, independent of the bandwidth of the link."""

    @property
    def full_bps(self) -> float | None:
        """The pattern's own full bandwidth, or None if it uses the link's."""

    def schedule(self, bandwidth_bps: float) -> Schedule:
        """The schedule for a link of this bandwidth."""


@dataclass(frozen=True, slots=True)
class Constant:
    full_bps: float | None = None

    def schedule(self, bandwidth_bps: float) -> Schedule:
        return Schedule((0.0,), (bandwidth_bps,))


@dataclass(frozen=True, slots=True)
class Step:
    """A drop to a lower bandwidth, and back."""

    full_bps: float | None
    low_bps: float | None
    at_s: float
    for_s: float

    def schedule(self, bandwidth_bps: float) -> Schedule:
        full_bps = self.full_bps or bandwidth_bps
        low_bps = self.low_bps or full_bps * STEP_SHARE
        return Schedule((0.0, self.at_s, self.at_s + self.for_s), (full_bps, low_bps, full_bps))


@dataclass(frozen=True, slots=True)
class Saw:
    """A bandwidth that falls step by step and then jumps back, repeatedly."""

    low_bps: float | None
    period_s: float
    full_bps: float | None = None

    def schedule(self, bandwidth_bps: float) -> Schedule:
        low_bps = self.low_bps or bandwidth_bps * SAW_SHARE
        slope_bps = (bandwidth_bps - low_bps) / (_SAW_LEVELS - 1)
        return Schedule(
            tuple(self.period_s * level / _SAW_LEVELS for level in range(_SAW_LEVELS)),
            tuple(bandwidth_bps - slope_bps * level for level in range(_SAW_LEVELS)),
            self.period_s,
        )


@dataclass(frozen=True, slots=True)
class Trace:
    """A recorded pattern. `full_bps` is its mean over time."""

    recorded: Schedule
    full_bps: float

    def schedule(self, bandwidth_bps: float) -> Schedule:  # noqa: ARG002 (a trace has its own bandwidths)
        return self.recorded


def parse_jitter(text: str) -> Pattern:
    """Parses a pattern as described above. Raises ConfigurationError."""
    kind, _, given = text.strip().partition(":")
    if kind == "none" and not given:
        return Constant()
    if kind == "trace" and given:
        return read_trace(Path(given))
    if kind in _OPTIONS:
        rates, seconds = _parameters(text, given, _OPTIONS[kind])
        if kind == "step" and len(rates) in (0, 2):
            full_bps, low_bps = rates or (None, None)
            return Step(full_bps, low_bps, seconds["at"], seconds["for"])
        if kind == "saw" and len(rates) <= 1:
            return Saw(rates[0] if rates else None, seconds["period"])
    raise _unknown(text)


def read_trace(path: Path) -> Trace:
    """Reads lines of "seconds bit/s", each the bandwidth from that time on. Comments begin with #. Raises
    ConfigurationError."""
    try:
        lines = [line.partition("#")[0].split() for line in path.read_text(encoding="utf-8").splitlines()]
        points = [(float(at), float(bandwidth)) for at, bandwidth in filter(None, lines)]
    except OSError as error:
        raise ConfigurationError(f"cannot read the trace {path}: {error.strerror}") from error
    except ValueError as error:
        raise ConfigurationError(
            f"{path} is not a trace: every line needs seconds and bit/s ({error})"
        ) from error
    starts = [at for at, _ in points]
    rising = all(before < after for before, after in itertools.pairwise(starts))
    usable = all(abs(at) <= _MOST_S and _LEAST_BPS <= bandwidth <= _MOST_BPS for at, bandwidth in points)
    if len(points) < 2 or not rising or not usable:
        raise ConfigurationError(
            f"{path} is not a trace: it needs two or more lines, with ascending times and bandwidths from "
            f"{_LEAST_BPS:g} to {_MOST_BPS:g} bit/s"
        )
    spans = [after - before for before, after in itertools.pairwise(starts)]
    # The length of the last span is not recorded, so it gets the mean length.
    spans.append(sum(spans) / len(spans))
    schedule = Schedule(
        tuple(at - starts[0] for at in starts), tuple(bandwidth for _, bandwidth in points), sum(spans)
    )
    moved = sum(span * bandwidth for span, (_, bandwidth) in zip(spans, points, strict=True))
    return Trace(schedule, moved / sum(spans))


class Adjustable(Protocol):
    """A link whose bandwidth can change while it carries bytes."""

    def set_bandwidth(self, bandwidth_bps: float) -> None: ...


@contextmanager
def playing(link: Adjustable, schedule: Schedule) -> Iterator[None]:
    """Plays the schedule on the link during the block, and then restores the first bandwidth.

    Raises the errors of changing the link.
    """
    began_s = time.monotonic()
    over = threading.Event()
    failures: list[Exception] = []

    def play() -> None:
        try:
            for at_s, bandwidth_bps in _without_first(schedule):
                if over.wait(began_s + at_s - time.monotonic()):
                    return
                link.set_bandwidth(bandwidth_bps)
        except Exception as error:
            failures.append(error)

    link.set_bandwidth(schedule.bandwidths_bps[0])
    player = threading.Thread(target=play, name="link-jitter", daemon=True)
    player.start()
    try:
        yield
    finally:
        over.set()
        player.join()
        link.set_bandwidth(schedule.bandwidths_bps[0])
    if failures:
        raise failures[0]


def _without_first(schedule: Schedule) -> Iterator[tuple[float, float]]:
    changes = schedule.changes()
    next(changes)
    return changes


def _parameters(
    text: str, given: str, defaults: dict[str, float]
) -> tuple[Sequence[float], dict[str, float]]:
    """Parsed parameters: bandwidths in order, and seconds by name."""
    rates: list[float] = []
    seconds = dict(defaults)
    for part in filter(None, given.split(",")):
        name, equals, value = part.partition("=")
        if not equals:
            rates.append(parse_bandwidth(part))
            continue
        found = _SECONDS.fullmatch(value.strip())
        if name not in seconds or found is None or not float(found[1]):
            raise _unknown(text)
        seconds[name] = float(found[1]) / (1000 if found[2] == "ms" else 1)
    return rates, seconds


def _unknown(text: str) -> ConfigurationError:
    return ConfigurationError(
        f"{text!r} is not a jitter pattern; patterns are none, step, step:1gbit,50mbit,at=0.1s,for=2s, saw, "
        "saw:50mbit,period=0.5s and trace:FILE"
    )
