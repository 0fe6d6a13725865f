"""How fast a link is: bandwidths as people write them, and the pieces in which bytes go over a link."""

import re

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


def piece_bytes(bytes_per_s: float) -> int:
    """How much to send at once over a link of that rate."""
    return min(max(int(PIECE_S * bytes_per_s), MIN_PIECE_BYTES), MAX_PIECE_BYTES)
