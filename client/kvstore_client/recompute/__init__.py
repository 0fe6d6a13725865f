"""Selective recompute: which tokens to recompute in KV that was computed in another context."""

from collections.abc import Callable, Mapping
from functools import lru_cache, partial

from kvstore_client.recompute.base import Probe, ReusedChunk, Selector
from kvstore_client.recompute.drift import Drift
from kvstore_client.recompute.first_k import FirstK
from kvstore_client.recompute.focus import Focus
from kvstore_client.recompute.frequency import Frequency, token_order
from kvstore_client.recompute.hkvd import HKVD
from kvstore_client.recompute.options import Recompute
from kvstore_client.recompute.query import Query
from kvstore_client.recompute.random import Random
from kvstore_client.recompute.select import FORCED_TOKENS, select
from kvstore_client.settings import SelectorName
from kvstore_codec.errors import ConfigurationError

_SELECTORS: Mapping[str, Callable[[], Selector]] = {
    SelectorName.FOCUS: Focus,
    SelectorName.QUERY: Query,
    SelectorName.HKVD: HKVD,
    SelectorName.FREQUENCY: partial(Frequency, "low"),
    SelectorName.FREQUENCY_HIGH: partial(Frequency, "high"),
    SelectorName.FIRST_K: FirstK,
    SelectorName.RANDOM: Random,
}


@lru_cache(maxsize=len(_SELECTORS))  # each selector logs a warning only once
def selector(name: str) -> Selector:
    """The selector of this name. Raises ConfigurationError for an unknown name."""
    try:
        return _SELECTORS[name]()
    except KeyError:
        known = ", ".join(_SELECTORS)
        raise ConfigurationError(f"there is no selector {name!r}; known are {known}") from None


__all__ = [
    "FORCED_TOKENS",
    "Drift",
    "Probe",
    "Recompute",
    "ReusedChunk",
    "Selector",
    "select",
    "selector",
    "token_order",
]
