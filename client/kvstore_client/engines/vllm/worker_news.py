"""What the worker's half has learned, on its way to the scheduler's half."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from kvstore_client.planning import CodecCost, Costs, Links

_EVERY_S = 0.1
"""Steps that compute nothing come in quick succession; only some of them bring news."""


@dataclass(frozen=True, slots=True)
class Learned:
    """Speeds of the worker's links and decoders."""

    links: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    """Bandwidth in bytes per second, and latency in seconds, by endpoint."""
    codecs: Mapping[str, CodecCost] = field(default_factory=dict)
    """By encoding."""
    receive_s_per_byte: float = 0.0
    """Seconds of decoding that each received byte costs besides."""


@dataclass(frozen=True, slots=True)
class News:
    """Sent after a step of the engine."""

    step: int
    """The step, as the scheduler's half has numbered it."""
    learned: Learned | None = None
    """None: nothing but what the last news told."""
    overtaken: frozenset[str] = frozenset()
    """Requests whose loads have ended because computing was faster; all that they lack is stored."""


class Newsroom:
    """Used by the worker's thread."""

    def __init__(self, links: Links, costs: Costs) -> None:
        self._links, self._costs = links, costs
        self._sent_s = -_EVERY_S
        self._told: Learned | None = None

    def after(self, step: int, overtaken: frozenset[str] = frozenset(), *, computes: bool) -> News | None:
        """News after a step; None where there is no need of any."""
        now_s = time.monotonic()
        if not (computes or overtaken) and now_s < self._sent_s + _EVERY_S:
            return None
        self._sent_s = now_s
        profile = self._costs.snapshot()
        learned = Learned(self._links.snapshot(), profile.codecs, profile.receive_s_per_byte)
        told, self._told = self._told, learned
        return News(step, learned if learned != told else None, overtaken)
