"""Bandwidths: parsing and formatting, and the size of the pieces that are sent over a limited link."""

import re

from kvstore_codec.errors import ConfigurationError

# A piece takes about PIECE_S on the link, so that low rates are smooth and a new rate takes effect at once. The
# smallest piece is one Ethernet payload; the largest keeps the cost per byte low at several Gbit/s.
PIECE_S = 0.002
MIN_PIECE_BYTES = 1460
MAX_PIECE_BYTES = 256 * 1024

_BANDWIDTH = re.compile(r"(\d+(?:\.\d+)?) ?(k|m|g|)bit", re.IGNORECASE)
_BITS = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9}


def parse_bandwidth(text: str) -> float:
    """Parses a bandwidth such as `500kbit`, `50mbit` or `2.5gbit` into bits per second. Units are decimal, as in `tc`.
    Raises ConfigurationError."""
    match = _BANDWIDTH.fullmatch(text.strip())
    bandwidth_bps = float(match[1]) * _BITS[match[2].lower()] if match else 0.0
    if not 0 < bandwidth_bps < float("inf"):
        raise ConfigurationError(f"{text!r} is not a bandwidth; write for example 500kbit, 50mbit or 1gbit")
    return bandwidth_bps


def format_bandwidth(bandwidth_bps: float) -> str:
    """Formats a bandwidth as `parse_bandwidth` reads it, in the largest unit that gives a number of at least 1."""
    unit = next((u for u in ("g", "m", "k") if bandwidth_bps >= _BITS[u]), "")
    return f"{bandwidth_bps / _BITS[unit]:g}{unit}bit"


def piece_bytes(bytes_per_s: float) -> int:
    """Bytes to send at once over a link of that rate."""
    return min(max(int(PIECE_S * bytes_per_s), MIN_PIECE_BYTES), MAX_PIECE_BYTES)
