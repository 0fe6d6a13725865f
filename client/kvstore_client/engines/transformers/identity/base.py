"""Result of a review of a loaded model."""

from dataclasses import dataclass

from kvstore_client.reuse.identity import Refusal
from kvstore_codec.model_spec import Scalar


@dataclass(frozen=True, slots=True)
class Review:
    """How a model differs from the one that its config describes."""

    refusal: Refusal | None
    """None when `numerics` describes every difference."""
    numerics: tuple[tuple[str, Scalar], ...] = ()
    """Settings and buffers whose values differ from what the config implies, for `ModelSpec.numerics`; sorted by
    name."""
