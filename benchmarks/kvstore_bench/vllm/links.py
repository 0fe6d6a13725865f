"""Names of links on the command line and in rows."""

from kvstore_codec.errors import ConfigurationError
from kvstore_service.bandwidth import format_bandwidth, parse_bandwidth

UNSHAPED = "unshaped"
BURST_S = 0.02
"""How much may pass a link at once, as time on the link. Clients with several connections lose no packets then."""

DEFAULT_LINKS = f"{UNSHAPED},1gbit,200mbit,100mbit,50mbit,10mbit"


def parse_links(text: str) -> list[float | None]:
    """Bandwidths in bit/s of comma-separated links; None is the unshaped one. Raises ConfigurationError."""
    links = [
        None if part.strip() == UNSHAPED else parse_bandwidth(part)
        for part in text.split(",")
        if part.strip()
    ]
    if not links:
        raise ConfigurationError(f"no link is given; write for example {DEFAULT_LINKS}")
    if len(set(links)) < len(links):
        raise ConfigurationError(f"a link is given twice in {text!r}")
    return links


def link_name(bandwidth_bps: float | None) -> str:
    return UNSHAPED if bandwidth_bps is None else format_bandwidth(bandwidth_bps)
