"""The ModelSpec of a loaded transformers model, from its config, its weights, and its deviations from both."""

from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from kvstore_client.engines.transformers.capture import attention_modules
from kvstore_client.engines.transformers.identity.modules import uncompiled, uncompiled_name
from kvstore_client.engines.transformers.identity.reference import Reference, reference_of
from kvstore_client.engines.transformers.identity.review import review
from kvstore_client.reuse.identity import Refusal
from kvstore_codec.errors import InvalidKVError, UnsupportedModelError
from kvstore_codec.model_config import spec_from_config
from kvstore_codec.model_spec import KVDtype, ModelSpec, weights_digest


@dataclass(frozen=True, slots=True)
class Description:
    """What a model computes, with the data needed to describe it again."""

    spec: ModelSpec
    refusal: Refusal | None
    """Why its KV must not be read or stored, although the model has a spec."""
    reference: Reference
    weights_known: bool = True
    """Whether the weights in `spec` are the model's."""


def spec_of(model: PreTrainedModel, model_id: str | None = None) -> ModelSpec:
    """Everything that the KV of `model` depends on, including its weights (about a second per 2 GB of weights).

    Raises UnsupportedModelError, with the reason, when its KV cannot be reused.
    """
    return describe(model, model_id).spec


def describe(
    model: PreTrainedModel,
    model_id: str | None = None,
    known: Description | None = None,
    *,
    same_weights: bool = False,
) -> Description:
    """Describe `model` relative to what its config implies; unchanged weights are taken from `known`.

    Raises UnsupportedModelError, with the reason, for any unexpected property of the model.
    """
    try:
        return _describe(model, model_id, known, same_weights=same_weights)
    except UnsupportedModelError:
        raise
    except Exception as error:
        raise cannot_describe(model, error) from error


def cannot_describe(model: PreTrainedModel, error: Exception) -> UnsupportedModelError:
    """The error to raise when inspecting `model` raised `error`."""
    return UnsupportedModelError(
        f"this {type(model).__name__} cannot be described ({type(error).__name__}: {error}); its KV is not reused"
    )


def loaded_model(model: Any) -> PreTrainedModel:
    """`model` without the wrapper of `torch.compile`: tensors keep their names, and `generate` works on either.

    Raises UnsupportedModelError for anything that is not a transformers model.
    """
    if not isinstance(model, nn.Module):
        raise UnsupportedModelError(f"a {type(model).__name__} is not a model; pass a transformers model")
    inner: Any = uncompiled(model)
    if not hasattr(inner, "generate") or not hasattr(inner, "config"):
        raise UnsupportedModelError(
            f"a {type(inner).__name__} has no `generate` or no config; pass a causal language model of transformers"
        )
    return cast("PreTrainedModel", inner)


def _describe(
    model: PreTrainedModel, model_id: str | None, known: Description | None, *, same_weights: bool
) -> Description:
    config = model.config.to_dict()
    spec = spec_from_config(config, weights_digest=bytes(32), dtype=_kv_dtype(model), model_id=model_id)
    if spec.rope is None or not hasattr(model.get_decoder(), "rotary_emb"):
        raise UnsupportedModelError(f"{spec.model_id} has no rotary positions; the adapter needs them")
    _require_one_dtype(model, spec.dtype)
    if known is not None and known.weights_known and same_weights:
        weights = known.spec.weights_digest
    else:
        weights = weights_digest(
            (uncompiled_name(name), tensor) for name, tensor in model.state_dict().items()
        )
    if known is not None and known.reference.config == config:
        reference = known.reference
    else:
        reference = reference_of(model.config)
    found = review(model, reference)
    numerics = tuple(sorted((*spec.numerics, *found.numerics)))
    return Description(replace(spec, weights_digest=weights, numerics=numerics), found.refusal, reference)


def _kv_dtype(model: PreTrainedModel) -> KVDtype:
    try:
        return KVDtype.of(model.dtype)
    except InvalidKVError as error:
        raise UnsupportedModelError(str(error)) from error


def _require_one_dtype(model: PreTrainedModel, dtype: KVDtype) -> None:
    """Raises UnsupportedModelError when some layer computes keys or values in another dtype than the model's."""
    for attention in attention_modules(model):
        for name in ("k_proj", "v_proj"):
            weight = getattr(attention.get_submodule(name), "weight", None)
            if (
                isinstance(weight, torch.Tensor)
                and weight.is_floating_point()
                and weight.dtype != dtype.torch
            ):
                raise UnsupportedModelError(
                    f"layers make KV of different types: a {name} has {weight.dtype} weights in a model of {dtype}"
                )
