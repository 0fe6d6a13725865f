"""What is compared: how tokens are chosen, and whether what they show moves their neighbours."""

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
    """Selectors that others have published go as they were published: without drift."""

    name: str
    selector: str
    drift: bool


class Cell(NamedTuple):
    method: Method
    ratio: float

    @property
    def recompute(self) -> Recompute:
        return Recompute(selector=self.method.selector, ratio=self.ratio, drift=self.method.drift)


def cells_of(methods: Sequence[Method], ratios: Sequence[float]) -> list[Cell]:
    """Raises ConfigurationError for a ratio that is none, or no ratio at all."""
    for ratio in ratios:
        if not 0 <= ratio <= 1:
            raise ConfigurationError(f"a recompute ratio of {ratio} is not between 0 and 1")
    if not ratios:
        raise ConfigurationError("nothing to measure: name a ratio at least")
    return [Cell(method, ratio) for method in methods for ratio in dict.fromkeys(ratios)]


def methods_named(names: Iterable[str]) -> tuple[Method, ...]:
    """Raises ConfigurationError for one that does not exist, or for none at all."""
    methods = tuple(_method(name) for name in dict.fromkeys(names))
    if not methods:
        raise ConfigurationError("nothing to measure: name a selector at least")
    return methods


def _method(name: str) -> Method:
    chosen = name.removesuffix(NO_DRIFT)
    if chosen != OURS and chosen != name:
        raise ConfigurationError(f"{name!r}: only {OURS} has drift that can be left out")
    selector(chosen)
    return Method(name, chosen, drift=name == OURS)
