"""Encodings: the rate, transform, coder and tokens per frame with which the frames of a chunk are coded."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from enum import StrEnum
from functools import lru_cache

from kvstore_codec.errors import UnknownEncodingError
from kvstore_codec.geometry import FRAME_TOKENS, MAX_CHUNK_TOKENS, MAX_LAYERS


class Rate(StrEnum):
    """Fidelity. EXACT keeps every bit. The other rates round to integers, which are coded without loss. Their steps are
    chosen for a KL divergence of .005, .02 and .06 nats per token from the model's predictions with exact KV."""

    EXACT = "exact"
    HIGH = "high"
    MEDIUM = "medium"
    LOW = "low"

    @property
    def rank(self) -> int:
        """0 for the most faithful rate."""
        return _FAITHFUL.index(self)

    @property
    def loss(self) -> float:
        """KL divergence that the rate's steps are chosen for, nats per token; 0 for EXACT."""
        return _LOSSES[self.rank]

    def is_at_least(self, other: Rate) -> bool:
        """Whether this rate is at least as faithful as `other`."""
        return self.rank <= other.rank


_FAITHFUL = tuple(Rate)
"""All rates, the most faithful first."""
_LOSSES = (0.0, 0.005, 0.02, 0.06)


class Transform(StrEnum):
    """Transform before quantisation. NONE works for any model (see `quantise`). KLT needs the model's calibration and
    gives far smaller chunks (see `klt_frames`)."""

    NONE = "none"
    KLT = "klt"


_VIDEO = ("hevc-cpu", "hevc-cpu-420", "hevc-nvenc")
# EXACT has no video coder: byte planes do not compress as pictures.
_EXACT_CODERS = ("zstd", "raw")
_CODERS = {
    Transform.NONE: ("zstd", "hevc-cpu", "hevc-nvenc", "raw"),  # its pictures are always 4:4:4
    Transform.KLT: ("pco", "zstd", *_VIDEO, "raw"),
}
# Names come from untrusted bytes: the expression matches in one way only, without backtracking.
_NAME = re.compile(
    r"(?P<rate>exact|high|medium|low|step(?P<step>[0-9][0-9.]*(?:e[+-]?[0-9]+)?))-(?P<klt>klt-)?(?P<coder>[a-z][a-z0-9-]*)"
    r"(?:@(?P<tokens>[1-9][0-9]{0,5})(?:x(?P<layers>[1-9][0-9]{0,3}))?)?",
    re.ASCII,
)
_LONGEST_NAME = 64
SMALLEST_STEP, LARGEST_STEP = 1e-30, 1e30
"""The product of such a step and any integer is far from the limits of f32."""


@dataclass(frozen=True, slots=True)
class Encoding:
    """How frames are coded. Raises UnknownEncodingError for a coder that does not support the rate and transform, for a
    step or a number of tokens out of range, and for a number of layers out of range or where the calibration or the
    video's pictures say it."""

    rate: Rate | float
    """A number is an explicit step: in units of the calibration's metric with KLT, otherwise a fraction of the
    residual's rms. The guard does not refine it."""
    coder: str
    transform: Transform = Transform.NONE
    frame_tokens: int = FRAME_TOKENS
    """The resolution: one picture per frame. More tokens give fewer, larger pictures with slightly fewer bytes."""
    period_layers: int | None = None
    """The most layers that are coded together. Fewer make smaller frames, of which each question over a part of a
    prefix reads what suits these layers best. None: as many as is usual (`geometry.period_layers_of`)."""
    name: str = field(init=False, repr=False, compare=False)
    """`<rate>-[klt-]<coder>[@<tokens>[x<layers>]]`, e.g. "exact-zstd", "exact-zstd@16x2", "medium-klt-pco" or
    "step0.004-klt-hevc-cpu@256"."""

    def __post_init__(self) -> None:
        exact, coders = self.rate is Rate.EXACT, _CODERS[self.transform]
        if exact:
            coders = _EXACT_CODERS if self.transform is Transform.NONE else ()
        if not isinstance(self.rate, Rate):
            object.__setattr__(self, "rate", float(self.rate))  # 1 and 1.0 must have the same name
        object.__setattr__(self, "name", self._make_name())
        step_fits = isinstance(self.rate, Rate) or SMALLEST_STEP <= self.rate <= LARGEST_STEP
        layers_fit = self.period_layers is None or (
            not self.is_video and not self.needs_calibration and 1 <= self.period_layers <= MAX_LAYERS
        )
        tokens_fit = 1 <= self.frame_tokens <= MAX_CHUNK_TOKENS
        if self.coder not in coders or not (step_fits and tokens_fit and layers_fit):
            raise _unknown(self.name)

    def _make_name(self) -> str:
        rate = str(self.rate) if isinstance(self.rate, Rate) else f"step{self.rate!r}"
        transform = "" if self.transform is Transform.NONE else f"{self.transform}-"
        frame = f"@{self.frame_tokens}"
        if self.period_layers is not None:
            frame += f"x{self.period_layers}"
        elif self.frame_tokens == FRAME_TOKENS:
            frame = ""
        return f"{rate}-{transform}{self.coder}{frame}"

    @property
    def layout(self) -> str:
        """ "planes" of bytes, KVFetcher's "token_frames", or "klt_frames"."""
        if self.rate is Rate.EXACT:
            return "planes"
        return "klt_frames" if self.transform is Transform.KLT else "token_frames"

    @property
    def family(self) -> str:
        """The name without the size of an explicit step and without the size of frames. There are few families, so
        that metrics may be labelled with them."""
        rate = str(self.rate) if isinstance(self.rate, Rate) else "step"
        return f"{rate}-{self.transform}-{self.coder}" if self.needs_calibration else f"{rate}-{self.coder}"

    @classmethod
    def families(cls) -> list[str]:
        """All families."""
        steps = [
            cls(1.0, coder, transform).family for transform, coders in _CODERS.items() for coder in coders
        ]
        return [*cls.names(), *steps]

    @property
    def is_video(self) -> bool:
        return self.coder in _VIDEO

    @property
    def needs_calibration(self) -> bool:
        return self.transform is Transform.KLT

    def may_follow(self, other: Encoding) -> bool:
        """Whether KV that was computed after reused KV of encoding `other` may be stored in this encoding: only if
        `other` is at least as faithful."""
        if other.rate is Rate.EXACT:
            return True
        if isinstance(self.rate, Rate) and isinstance(other.rate, Rate):
            return other.rate.is_at_least(self.rate)
        return self.rate == other.rate and self.transform is other.transform

    @classmethod
    @lru_cache(maxsize=1024)  # every chunk header names one, and there are few
    def parse(cls, name: str) -> Encoding:
        """The inverse of `name`. Raises UnknownEncodingError, listing the known names."""
        found = _NAME.fullmatch(name) if len(name) <= _LONGEST_NAME else None
        if found is None:
            raise _unknown(name)
        try:
            rate = float(found["step"]) if found["step"] else Rate(found["rate"])
        except ValueError:
            raise _unknown(name) from None
        transform = Transform.KLT if found["klt"] else Transform.NONE
        layers = int(found["layers"]) if found["layers"] else None
        encoding = cls(rate, found["coder"], transform, int(found["tokens"] or FRAME_TOKENS), layers)
        if encoding.name != name:  # one encoding has one name
            raise _unknown(name)
        return encoding

    @classmethod
    def names(cls) -> list[str]:
        """Names of all encodings with a named rate and 64 tokens per frame."""
        return [cls(Rate.EXACT, coder).name for coder in _EXACT_CODERS] + [
            cls(rate, coder, transform).name
            for transform, coders in _CODERS.items()
            for rate in (Rate.HIGH, Rate.MEDIUM, Rate.LOW)
            for coder in coders
        ]


def _unknown(name: str) -> UnknownEncodingError:
    return UnknownEncodingError(
        f"there is no encoding {name[:_LONGEST_NAME]!r}; known are {', '.join(Encoding.names())}; step0.004 (as Python "
        "writes the number: step2.0, step1e-06) in place of a rate sets the step, @128 or @256 at the end the tokens "
        "of a frame, and @16x2 its tokens and layers, which video and calibrations have their own numbers of"
    )
