"""How fast copies may be sent."""

import math


class Pace:
    """A leaky bucket: on average `bytes_per_s`, and never more than one copy ahead of that. Clocks are the caller's,
    in seconds."""

    def __init__(self, bytes_per_s: float) -> None:
        self._bytes_per_s = bytes_per_s
        self._free_at_s = -math.inf

    def wait_s(self, now_s: float) -> float:
        """How long the next copy has to wait."""
        return max(0.0, self._free_at_s - now_s)

    def sent(self, size_bytes: int, now_s: float) -> None:
        self._free_at_s = max(self._free_at_s, now_s) + size_bytes / self._bytes_per_s
