"""The compared methods: how recomputed tokens are selected, and whether their change shifts their neighbours
(drift)."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from kvstore_client.recompute import Recompute, selector
from kvstore_codec.errors import ConfigurationError

NO_DRIFT = "-nodrift"
OURS = "focus"
DEFAULT_METHODS = (OURS, OURS + NO_DRIFT, "query", "hkvd", "first_k", "frequency", "frequency-high", "random")


@dataclass(frozen=True, slots=True)
class Method:
    """A selector, with drift or without. Selectors published by others are used as published, without drift."""

    name: str
    selector: str
    drift: bool


class Cell(NamedTuple):
    """One combination of method and recompute ratio."""

    method: Method
    ratio: float

    @property
    def recompute(self) -> Recompute:
        return Recompute(selector=self.method.selector, ratio=self.ratio, drift=self.method.drift)


def cells_of(methods: Sequence[Method], ratios: Sequence[float]) -> list[Cell]:
    """All combinations. Raises ConfigurationError for a ratio outside 0 to 1, or no ratio."""
    for ratio in ratios:
        if not 0 <= ratio <= 1:
            raise ConfigurationError(f"recompute ratio {ratio} is not between 0 and 1")
    if not ratios:
        raise ConfigurationError("nothing to measure: name at least one ratio")
    return [Cell(method, ratio) for method in methods for ratio in dict.fromkeys(ratios)]


def methods_named(names: Iterable[str]) -> tuple[Method, ...]:
    """The methods of these names. Raises ConfigurationError for an unknown name, or no name."""
    methods = tuple(_method(name) for name in dict.fromkeys(names))
    if not methods:
        raise ConfigurationError("nothing to measure: name at least one selector")
    return methods


def _method(name: str) -> Method:
    chosen = name.removesuffix(NO_DRIFT)
    if chosen != OURS and chosen != name:
        raise ConfigurationError(
            f"there is no method {name!r}: only {OURS} has drift, so only {OURS}{NO_DRIFT} exists"
        )
    selector(chosen)
    return Method(name, chosen, drift=name == OURS)
