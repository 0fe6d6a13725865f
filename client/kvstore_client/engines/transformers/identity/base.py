"""What a look at a loaded model finds."""

from dataclasses import dataclass

from kvstore_client.reuse.identity import Refusal
from kvstore_codec.model_spec import Scalar


@dataclass(frozen=True, slots=True)
class Review:
    """How a model differs from the one that its config describes."""

    refusal: Refusal | None
    """None when `numerics` says all of it."""
    numerics: tuple[tuple[str, Scalar], ...] = ()
    """Settings and buffers with other values than the config implies, for `ModelSpec.numerics`; sorted by name."""
