"""How fast a link is: bandwidths as people write them, and the schedule that a bandwidth imposes."""

import re
import threading

from kvstore_codec.errors import ConfigurationError

# A piece is what one recv takes: about PIECE_S of the link, so that low rates stay smooth and a new rate bites
# at once, between one Ethernet payload and what keeps the cost per byte low at several Gbit/s.
PIECE_S = 0.002
MIN_PIECE_BYTES = 1460
MAX_PIECE_BYTES = 256 * 1024

_BANDWIDTH = re.compile(r"(\d+(?:\.\d+)?) ?(k|m|g|)bit", re.IGNORECASE)
_BITS = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9}


def parse_bandwidth(text: str) -> float:
    """Bits per second from `50mbit`, `1gbit`, `2.5gbit`, `500kbit` (decimal units, as `tc` writes them)."""
    match = _BANDWIDTH.fullmatch(text.strip())
    bandwidth_bps = float(match[1]) * _BITS[match[2].lower()] if match else 0.0
    if not 0 < bandwidth_bps < float("inf"):
        raise ConfigurationError(f"{text!r} is no bandwidth; write for example 500kbit, 50mbit or 1gbit")
    return bandwidth_bps


def format_bandwidth(bandwidth_bps: float) -> str:
    """As `parse_bandwidth` reads it, in the largest unit of which it is a whole one."""
    unit = next((u for u in ("g", "m", "k") if bandwidth_bps >= _BITS[u]), "")
    return f"{bandwidth_bps / _BITS[unit]:g}{unit}bit"


class TokenBucket:
    """The schedule of one direction: who may send which bytes when. Shared by all its connections.

    Kept as the time at which the link is next free rather than as a count of tokens (the virtual scheduling
    form of the token bucket, ITU-T I.371), so nothing has to run while nothing is sent.
    """

    def __init__(self, rate_bps: float, burst_bytes: int) -> None:
        self._lock = threading.Lock()
        self._burst_bytes = burst_bytes
        self._free_at = 0.0
        self.reserved_bytes = 0
        self.set_rate(rate_bps)

    def set_rate(self, rate_bps: float) -> None:
        if not 0 < rate_bps < float("inf"):
            raise ConfigurationError(f"a link needs a bandwidth above 0 bit/s, not {rate_bps}")
        with self._lock:
            self.rate_bps = rate_bps
            self.piece_bytes = min(max(int(PIECE_S * rate_bps / 8), MIN_PIECE_BYTES), MAX_PIECE_BYTES)

    def reserve(self, size_bytes: int, ready_at: float) -> float:
        """When the last of these bytes, which were ready to go at `ready_at`, has left. Times are monotonic."""
        with self._lock:
            start = max(self._free_at, ready_at - self._burst_bytes * 8 / self.rate_bps)
            self._free_at = start + size_bytes * 8 / self.rate_bps
            self.reserved_bytes += size_bytes
            return max(self._free_at, ready_at)
