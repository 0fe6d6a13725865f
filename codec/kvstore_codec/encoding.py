"""How the frames of a chunk are coded: a rate and a coder."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from kvstore_codec.errors import UnknownEncodingError


class Rate(StrEnum):
    """EXACT keeps every bit; HIGH rounds to integers (see `quantise`) and keeps those exactly."""

    EXACT = "exact"
    HIGH = "high"


# EXACT has no video coder: planes of exponents are not pictures.
_CODERS = {
    Rate.EXACT: ("zstd", "raw"),
    Rate.HIGH: ("zstd", "hevc-cpu", "raw"),
}


@dataclass(frozen=True, slots=True)
class Encoding:
    """Raises UnknownEncodingError for a coder the rate does not go with."""

    rate: Rate
    coder: str

    def __post_init__(self) -> None:
        if self.coder not in _CODERS.get(self.rate, ()):
            raise _unknown(f"{self.rate}-{self.coder}")

    @property
    def name(self) -> str:
        """`<rate>-<coder>`, e.g. "exact-zstd" or "high-hevc-cpu"."""
        return f"{self.rate}-{self.coder}"

    @classmethod
    def parse(cls, name: str) -> Encoding:
        """The inverse of `name`. Raises UnknownEncodingError, listing the known names."""
        if name not in cls.names():
            raise _unknown(name)
        rate, _, coder = name.partition("-")
        return cls(Rate(rate), coder)

    @classmethod
    def names(cls) -> list[str]:
        return [f"{rate}-{coder}" for rate, coders in _CODERS.items() for coder in coders]


def _unknown(name: str) -> UnknownEncodingError:
    return UnknownEncodingError(f"there is no encoding {name!r}; known are {', '.join(Encoding.names())}")
