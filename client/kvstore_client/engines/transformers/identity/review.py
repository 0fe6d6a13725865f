"""Full review of a model."""

import torch
from transformers import PreTrainedModel

from kvstore_client.engines.transformers.identity.base import Review
from kvstore_client.engines.transformers.identity.code import (
    classes_of,
    foreign_code,
    replaced_model,
    replaced_module,
)
from kvstore_client.engines.transformers.identity.hooks import foreign_hook
from kvstore_client.engines.transformers.identity.modules import named_modules
from kvstore_client.engines.transformers.identity.precision import float32_matmul_precision
from kvstore_client.engines.transformers.identity.reference import Reference
from kvstore_client.engines.transformers.identity.settings import differences
from kvstore_client.reuse.identity import Refusal
from kvstore_codec.model_spec import Scalar


def review(model: PreTrainedModel, reference: Reference) -> Review:
    """Compare `model` with what its config implies: about 10 ms for 30 layers.

    Modules behind the decoder (the head) are left out: KV does not depend on them.
    """
    decoder = model.get_decoder()
    numerics: dict[str, Scalar] = {}
    refusal = foreign_hook([("", model), *decoder.named_modules()])
    modules = dict(named_modules(decoder))
    refusal = refusal or replaced_model(model, reference)
    refusal = refusal or foreign_code(model, classes_of((model, *modules.values())))
    if not getattr(model.config, "is_causal", True):
        refusal = refusal or Refusal(
            "changed_setting", "config.is_causal is off: tokens attend to later ones"
        )
    for name, module in modules.items():
        implied = reference.modules.get(name)
        if implied is None:
            refusal = refusal or Refusal("patched_module", f"{name} was added")
            continue
        refusal = refusal or replaced_module(name, module, implied)
        for difference in differences(name, module, implied, model.config):
            if isinstance(difference, Refusal):
                refusal = refusal or difference
            else:
                numerics[difference.name] = difference.value
    precision = float32_matmul_precision()
    if model.dtype == torch.float32 and precision != "highest":
        numerics["float32_matmul_precision"] = precision
    return Review(refusal, tuple(sorted(numerics.items())))
