"""A fetch that an engine waits for, against computing instead."""

import time
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from kvstore_client.planning.leading import compute_from_s
from kvstore_client.planning.profile import PrefillCost

_LATE_SHARE, _LATE_S = 0.1, 0.05
"""A request may end later than one that was computed from the beginning, by this share of the computing time and these
seconds. Then the engine computes, whatever the link promises."""

_SURE_S = 0.1
"""For so long computing must look faster. The bandwidth is that of a tenth of a second: a shorter pause of the link, or
of this process, is no reason."""


class Race:
    """Decides when the engine had better compute what has not arrived. Used by one thread at a time."""

    def __init__(
        self,
        bounds: Sequence[int],
        end_token: int,
        prefill: PrefillCost,
        began_s: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`bounds` are the positions of the chunks' first tokens, then the one behind the last chunk; the prompt ends
        before `end_token`. The engine waits since `began_s` of the clock, by default since now."""
        self._clock, self._began_s = clock, clock() if began_s is None else began_s
        self._compute_s = compute_from_s(np.asarray(bounds, np.intp), end_token, prefill)
        everything_s = float(self._compute_s[0])
        self._limit_s = everything_s * (1 + _LATE_SHARE) + _LATE_S
        self._slower_since_s: float | None = None

    def is_lost(self, delivered: int, waits: Iterable[tuple[str, float | None]]) -> bool:
        """Whether the engine had better compute all but the `delivered` leading chunks. `waits` has, for each chunk
        behind these that is still to come, its endpoint and the seconds that its rest takes on the endpoint's link
        alone; None: not known."""
        now_s = self._clock()
        rest_s = float(self._compute_s[delivered])
        if now_s - self._began_s + rest_s > self._limit_s:
            return True
        if not self._is_slower(delivered, rest_s, waits):
            self._slower_since_s = None
            return False
        if self._slower_since_s is None:
            self._slower_since_s = now_s
        return now_s - self._slower_since_s >= _SURE_S

    def _is_slower(self, delivered: int, rest_s: float, waits: Iterable[tuple[str, float | None]]) -> bool:
        """Whether waiting for the next 1, 2, ... chunks, and computing what is behind them, always takes longer than
        computing now."""
        arrived_s: dict[str, float] = {}
        latest_s, coming = 0.0, 0
        for endpoint, seconds in waits:
            if seconds is None:
                return False
            arrived_s[endpoint] = arrived_s.get(endpoint, 0.0) + seconds
            latest_s = max(latest_s, arrived_s[endpoint])
            coming += 1
            if latest_s + self._compute_s[delivered + coming] < rest_s:
                return False
        return coming > 0
