"""How the frames of a chunk are coded: a rate, a transform and a coder."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from kvstore_codec.errors import UnknownEncodingError


class Rate(StrEnum):
    """EXACT keeps every bit. The others round to integers and keep those exactly; with a calibration their steps are
    chosen for a KL divergence of .005, .02 and .06 from what the model says with exact KV."""

    EXACT = "exact"
    HIGH = "high"
    MEDIUM = "medium"
    LOW = "low"


class Transform(StrEnum):
    """NONE works for any model (see `quantise`); KLT needs the model's calibration, and is far smaller
    (see `klt_frames`)."""

    NONE = "none"
    KLT = "klt"


# EXACT has no video coder: planes of exponents are not pictures.
_KLT_CODERS = ("pco", "zstd", "hevc-cpu", "raw")
_CODERS = {
    (Rate.EXACT, Transform.NONE): ("zstd", "raw"),
    (Rate.HIGH, Transform.NONE): ("zstd", "hevc-cpu", "raw"),
    (Rate.HIGH, Transform.KLT): _KLT_CODERS,
    (Rate.MEDIUM, Transform.KLT): _KLT_CODERS,
    (Rate.LOW, Transform.KLT): _KLT_CODERS,
}


@dataclass(frozen=True, slots=True)
class Encoding:
    """Raises UnknownEncodingError for a coder that rate and transform do not go with."""

    rate: Rate
    coder: str
    transform: Transform = Transform.NONE

    def __post_init__(self) -> None:
        if self.coder not in _CODERS.get((self.rate, self.transform), ()):
            raise _unknown(self.name)

    @property
    def name(self) -> str:
        """`<rate>-<coder>` or `<rate>-klt-<coder>`, e.g. "exact-zstd" or "medium-klt-pco"."""
        return _name(self.rate, self.transform, self.coder)

    @property
    def needs_calibration(self) -> bool:
        return self.transform is Transform.KLT

    @classmethod
    def parse(cls, name: str) -> Encoding:
        """The inverse of `name`. Raises UnknownEncodingError, listing the known names."""
        if name not in _BY_NAME:
            raise _unknown(name)
        return _BY_NAME[name]

    @classmethod
    def names(cls) -> list[str]:
        return list(_BY_NAME)


def _name(rate: Rate, transform: Transform, coder: str) -> str:
    return f"{rate}-{coder}" if transform is Transform.NONE else f"{rate}-{transform}-{coder}"


def _unknown(name: str) -> UnknownEncodingError:
    return UnknownEncodingError(f"there is no encoding {name!r}; known are {', '.join(Encoding.names())}")


_BY_NAME = {
    _name(rate, transform, coder): Encoding(rate, coder, transform)
    for (rate, transform), coders in _CODERS.items()
    for coder in coders
}
