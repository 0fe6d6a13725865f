"""Small random models of every supported family."""

import torch
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

_SIZES = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 8192,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": None,
}

FAMILIES = {
    "llama": (LlamaConfig, LlamaForCausalLM, {"head_dim": 16}),
    "llama3-rope": (
        LlamaConfig,
        LlamaForCausalLM,
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 1024,
            }
        },
    ),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 32}),
    "mistral": (MistralConfig, MistralForCausalLM, {"head_dim": 16, "sliding_window": None}),
    "gemma3": (
        Gemma3TextConfig,
        Gemma3ForCausalLM,
        {
            "num_key_value_heads": 1,
            "head_dim": 256,
            "sliding_window": 96,
            "layer_types": [*["sliding_attention", "full_attention"] * 2, "sliding_attention"],
        },
    ),
    "mistral-windows": (MistralConfig, MistralForCausalLM, {"head_dim": 16, "sliding_window": 96}),
    "qwen2-windows": (
        Qwen2Config,
        Qwen2ForCausalLM,
        {"use_sliding_window": True, "sliding_window": 96, "max_window_layers": 2},
    ),
}


def tiny_model(
    family: str = "llama", dtype: torch.dtype = torch.float32, seed: int = 0, **sizes: object
) -> PreTrainedModel:
    """A random model of a few hundred thousand weights; the same seed gives the same weights."""
    config, architecture, extra = FAMILIES[family]
    torch.manual_seed(seed)
    return architecture(config(**(_SIZES | extra | sizes))).to(dtype).eval()


def random_prompt(tokens: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, 512, (1, tokens), generator=generator)
