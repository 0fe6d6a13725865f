"""The recompute ratio while requests come and go: it follows the link."""

import threading

from kvstore_client.fork import renew_in_children
from kvstore_client.recompute.tuning import LEAST_RATIO, balance, require_bounds

_SHARE = 0.25
"""Of the way to where the ratio should be, and to what the last pass took."""
MOST_STEP = 0.1
"""Of the ratio, from one request to the next: a bandwidth that is wrong for a moment costs little."""


class RatioOnline:
    """Of one model and engine. Thread-safe.

    Begins at `ratio`, best a tuned one, and moves towards the balance of T(r) (`kvstore_client.recompute.tuning`) with
    the bandwidth that was measured last, between `least`, below which the answers suffer, and `most`. Raises
    ConfigurationError for bounds that are none.
    """

    def __init__(
        self,
        ratio: float = LEAST_RATIO,
        *,
        least: float = LEAST_RATIO,
        most: float = 1.0,
        compute_s: float | None = None,
    ) -> None:
        """`compute_s`: what computing a token takes, where that is known already."""
        require_bounds(least, most)
        self._least, self._most = least, most
        self._ratio = min(max(ratio, least), most)
        self._compute_s = compute_s
        self._renew()
        renew_in_children(self, RatioOnline._renew)

    def _renew(self) -> None:
        """In a forked child: another thread of the parent may have held the lock."""
        self._lock = threading.Lock()

    def computed(self, tokens: int, seconds: float) -> None:
        """A pass over so many tokens took so long, without what it waited for KV. A pass over none says nothing."""
        if tokens < 1 or seconds <= 0:
            return
        with self._lock:
            known_s = seconds / tokens if self._compute_s is None else self._compute_s
            self._compute_s = known_s + _SHARE * (seconds / tokens - known_s)

    def ratio(self, token_bytes: float, bandwidth_Bps: float | None) -> float:  # noqa: N803
        """For the next request, which would fetch `token_bytes` a token over a link of so much (`Links.bandwidth_Bps`;
        None when nothing is known of it: the ratio then stays)."""
        with self._lock:
            if bandwidth_Bps is not None and bandwidth_Bps > 0 and self._compute_s is not None:
                wanted = balance(self._compute_s, token_bytes / bandwidth_Bps)
                wanted = min(max(wanted, self._least), self._most)
                step = _SHARE * (wanted - self._ratio)
                self._ratio += min(max(step, -MOST_STEP), MOST_STEP)
            return self._ratio
