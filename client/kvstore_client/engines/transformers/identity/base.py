"""What a look at a loaded model finds."""

from dataclasses import dataclass

from kvstore_codec.model_spec import Scalar


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a model's KV must be neither read nor stored."""

    reason: str
    """One word for metrics and reports, such as `forward_hook`."""
    detail: str
    """A sentence for the log: which module or function it is, and what to do."""


@dataclass(frozen=True, slots=True)
class Review:
    """How a model differs from the one that its config describes."""

    refusal: Refusal | None
    """None when `numerics` says all of it."""
    numerics: tuple[tuple[str, Scalar], ...] = ()
    """Settings and buffers with other values than the config implies, for `ModelSpec.numerics`; sorted by name."""
