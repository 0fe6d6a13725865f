"""What a config implies: the modules that transformers builds from it, their settings, and float32 buffers."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING

from kvstore_client.engines.transformers.identity.modules import named_modules

_TORCH_ATTRIBUTES = frozenset(vars(nn.Module()))


@dataclass(frozen=True, slots=True)
class ReferenceModule:
    """One module as the config implies it."""

    module_class: type[nn.Module]
    settings: Mapping[str, object]
    """Public attributes of the module, without those of torch."""
    children: frozenset[str]
    buffers: Mapping[str, torch.Tensor]
    """Buffers outside `state_dict`, in host memory."""


@dataclass(frozen=True, slots=True)
class Reference:
    """A decoder as its config implies it."""

    config: Mapping[str, Any]
    """Config that the decoder was built from."""
    model_class: type[PreTrainedModel]
    """Class of the causal language model."""
    modules: Mapping[str, ReferenceModule]
    """Modules of the decoder, by name."""


def reference_of(config: PreTrainedConfig) -> Reference:
    """Build the decoder without memory for its weights: 0.1 s for 30 layers. `config` is of a supported family."""
    own = copy.deepcopy(config)
    own._attn_implementation = "eager"  # some choices are impossible without weights
    config_class = type(own) if type(own) in MODEL_MAPPING else CONFIG_MAPPING[own.model_type]
    with torch.device("meta"):
        decoder = MODEL_MAPPING[config_class](own).eval()
    with torch.device("cpu"):  # buffers are filled there, whatever the default device is
        modules = {name: _module(decoder, module) for name, module in named_modules(decoder)}
    return Reference(config.to_dict(), MODEL_FOR_CAUSAL_LM_MAPPING[config_class], modules)


@torch.no_grad()
def _module(decoder: PreTrainedModel, module: nn.Module) -> ReferenceModule:
    names = sorted(module._non_persistent_buffers_set)
    if names:
        # Like from_pretrained: `_init_weights` fills the buffers that no checkpoint holds.
        for name in names:
            if (unfilled := module._buffers[name]) is not None:
                module._buffers[name] = torch.empty_like(unfilled, device="cpu")
        decoder._init_weights(module)
    settings = {
        name: value
        for name, value in vars(module).items()
        if name not in _TORCH_ATTRIBUTES
        and not name.startswith("_")
        and not isinstance(value, PreTrainedConfig)
    }
    buffers = {name: buffer for name in names if (buffer := module._buffers[name]) is not None}
    return ReferenceModule(type(module), settings, frozenset(module._modules), buffers)
