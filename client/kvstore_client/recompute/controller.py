"""Online controller of the recompute ratio: follows the link from request to request."""

import threading

from kvstore_client.fork import renew_in_children
from kvstore_client.recompute.tuning import LEAST_RATIO, balance, require_bounds

_SHARE = 0.25
"""Smoothing factor of the ratio and of the measured compute time."""
MOST_STEP = 0.1
"""Largest change of the ratio between two requests: a briefly wrong bandwidth costs little."""


class RatioOnline:
    """Recompute ratio of one model and engine. Thread-safe.

    Begins at `ratio`, ideally a tuned one, and moves toward the balance of T(r) (`kvstore_client.recompute.tuning`) at
    the latest measured bandwidth, between `least`, below which answers suffer, and `most`. Raises ConfigurationError
    for invalid bounds.
    """

    def __init__(
        self,
        ratio: float = LEAST_RATIO,
        *,
        least: float = LEAST_RATIO,
        most: float = 1.0,
        compute_s: float | None = None,
    ) -> None:
        """`compute_s` is the known compute time per token, if any."""
        require_bounds(least, most)
        self._least, self._most = least, most
        self._ratio = min(max(ratio, least), most)
        self._compute_s = compute_s
        self._renew()
        renew_in_children(self, RatioOnline._renew)

    def _renew(self) -> None:
        """Reset in a forked child: another thread of the parent may have held the lock."""
        self._lock = threading.Lock()

    def computed(self, tokens: int, seconds: float) -> None:
        """Record a pass over this many tokens, without its waits for KV. A pass over no tokens is ignored."""
        if tokens < 1 or seconds <= 0:
            return
        with self._lock:
            known_s = seconds / tokens if self._compute_s is None else self._compute_s
            self._compute_s = known_s + _SHARE * (seconds / tokens - known_s)

    def ratio(self, token_bytes: float, bandwidth_Bps: float | None) -> float:  # noqa: N803
        """Ratio of the next request, which would fetch `token_bytes` per token over a link of this bandwidth
        (`Links.bandwidth_Bps`; None when it is unknown: the ratio then stays)."""
        with self._lock:
            if bandwidth_Bps is not None and bandwidth_Bps > 0 and self._compute_s is not None:
                wanted = balance(self._compute_s, token_bytes / bandwidth_Bps)
                wanted = min(max(wanted, self._least), self._most)
                step = _SHARE * (wanted - self._ratio)
                self._ratio += min(max(step, -MOST_STEP), MOST_STEP)
            return self._ratio
