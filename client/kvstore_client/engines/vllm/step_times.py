"""The engine's speed of computing prompts, learned from its own steps."""

import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from kvstore_client.planning import PrefillCost
from kvstore_client.planning.prefill_fit import TimedPass, fit

_LEAST_TOKENS = 16
"""A request with fewer tokens in a step generates, or finishes a prompt: the step says nothing about prompts."""

_HALF_LIFE, _MOST_STEPS = 16, 64
"""A step counts half as much after this many later ones, and not at all after the second number."""

_TERM_ERROR = 0.05**2
"""A further term of the cost must lower the root mean square error by about 5 %. Steps differ that much by chance."""

_MOST_OPEN = 16
"""Steps that may be under way. Those before them never ended."""


@dataclass(frozen=True, slots=True)
class _Step:
    begun_s: float
    prompt_tokens: int
    tokens: int
    pairs: float


class StepTimes:
    """Learns from steps that compute tokens of prompts. Used by the scheduler's thread.

    A step lasts from when it was scheduled, or from the end of the step before it where the engine schedules ahead,
    until its output is back.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._open: dict[int, _Step] = {}
        self._last_end_s = 0.0
        self._passes: deque[TimedPass] = deque(maxlen=_MOST_STEPS)
        self._prefill: PrefillCost | None = None

    @property
    def prefill(self) -> PrefillCost | None:
        """The present cost of computing prompts; None as long as no prompt was computed."""
        if self._prefill is None and self._passes:
            ages = range(len(self._passes) - 1, -1, -1)
            self._prefill = fit(self._passes, [0.5 ** (age / _HALF_LIFE) for age in ages], _TERM_ERROR)
        return self._prefill

    def began(self, step: int, scheduled: Any) -> None:
        """The engine has scheduled a step (vLLM's SchedulerOutput)."""
        pieces = list(_pieces(scheduled))
        self._open[step] = _Step(
            self._clock(),
            sum(tokens for _, tokens in pieces if tokens >= _LEAST_TOKENS),
            sum(tokens for _, tokens in pieces),
            sum(tokens * (first + tokens / 2) for first, tokens in pieces),
        )
        while len(self._open) > _MOST_OPEN:
            del self._open[next(iter(self._open))]

    def ended(self, step: int) -> None:
        """The output of the step is back."""
        done, now_s = self._open.pop(step, None), self._clock()
        if done is None:
            return
        seconds = now_s - max(done.begun_s, self._last_end_s)
        self._last_end_s = now_s
        if done.prompt_tokens >= _LEAST_TOKENS and seconds > 0:
            self._passes.append(TimedPass(done.tokens, done.pairs, seconds))
            self._prefill = None


def _pieces(scheduled: Any) -> Iterator[tuple[int, int]]:
    """First position, and number of tokens, of each request in a step."""
    tokens = scheduled.num_scheduled_tokens
    for new in scheduled.scheduled_new_reqs:
        yield new.num_computed_tokens, tokens[new.req_id]
    cached = scheduled.scheduled_cached_reqs
    for request_id, computed in zip(cached.req_ids, cached.num_computed_tokens, strict=True):
        yield computed, tokens[request_id]
