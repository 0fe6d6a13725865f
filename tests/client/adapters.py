"""LoRA adapters on disk, as PEFT saves them."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

_OUTPUTS = {"q_proj": 128, "k_proj": 64, "v_proj": 64}
"""Of the attention of `tests.vllm.models.saved_model`."""
_INPUTS, _LAYERS, _RANK = 128, 4, 4


def adapter_tensors(seed: int) -> dict[str, torch.Tensor]:
    """Random weights, large enough to change what the model says. Other seeds give other weights of the same shapes."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for layer in range(_LAYERS):
        for module, outputs in _OUTPUTS.items():
            name = f"base_model.model.model.layers.{layer}.self_attn.{module}"
            found[f"{name}.lora_A.weight"] = torch.randn(_RANK, _INPUTS, generator=generator)
            found[f"{name}.lora_B.weight"] = torch.randn(outputs, _RANK, generator=generator)
    return found


def saved_adapter(folder: Path, seed: int, **config: Any) -> Path:
    """An adapter in `folder`, in place of one that is there; its weights are written into the same file. `config` has
    further entries of its configuration."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(adapter_tensors(seed), folder / "adapter_model.safetensors", metadata={"format": "pt"})
    told = {
        "peft_type": "LORA",
        "r": _RANK,
        "lora_alpha": 8,
        "bias": "none",
        "target_modules": sorted(_OUTPUTS),
    }
    (folder / "adapter_config.json").write_text(json.dumps(told | config))
    return folder
