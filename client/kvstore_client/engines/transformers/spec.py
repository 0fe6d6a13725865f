"""The ModelSpec of a loaded transformers model."""

from transformers import PreTrainedModel

from kvstore_codec.errors import UnsupportedModelError
from kvstore_codec.model_config import spec_from_config
from kvstore_codec.model_spec import KVDtype, ModelSpec, weights_digest


def spec_of(model: PreTrainedModel, model_id: str | None = None) -> ModelSpec:
    """What the KV of `model` depends on, its weights included (about a second per 2 GB of them).

    Raises UnsupportedModelError when its KV cannot be reused, and says why.
    """
    spec = spec_from_config(
        model.config.to_dict(),
        weights_digest=weights_digest(model.state_dict().items()),
        dtype=KVDtype.of(model.dtype),
        model_id=model_id,
    )
    if spec.rope is None:
        raise UnsupportedModelError(f"{spec.model_id} has no rotary positions; the adapter needs them")
    return spec
