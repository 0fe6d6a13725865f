"""Options of selective recompute."""

from dataclasses import dataclass

from kvstore_client.settings import SelectorName
from kvstore_codec.errors import ConfigurationError


@dataclass(frozen=True, slots=True)
class Recompute:
    """How text reused in another context is repaired. Raises ConfigurationError for invalid options."""

    selector: str = SelectorName.FOCUS
    """Name of the selector that chooses the tokens."""
    ratio: float = 0.15
    """Share of the text's tokens that is recomputed."""
    drift: bool = True
    """Whether neighbours of recomputed tokens move with them; see `Drift`."""

    def __post_init__(self) -> None:
        if self.selector not in list(SelectorName):
            known = ", ".join(SelectorName)
            raise ConfigurationError(f"there is no selector {self.selector!r}; known are {known}")
        if not 0 <= self.ratio <= 1:
            raise ConfigurationError(f"a recompute ratio of {self.ratio} is not between 0 and 1")
