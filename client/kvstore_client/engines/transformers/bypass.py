"""Which `generate` calls are left alone, and why."""

from collections.abc import Mapping
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel

# Arguments that leave the KV of the prompt what a plain prefill makes it. Anything else is passed through untouched:
# an argument unknown here may change what the model computes, and a wrong answer is worse than a slow one.
_HARMLESS = frozenset({
    "attention_mask", "generation_config", "logits_processor", "stopping_criteria", "streamer", "tokenizer",
    "return_dict_in_generate", "output_scores", "output_logits", "use_cache",
    "max_length", "max_new_tokens", "min_length", "min_new_tokens", "max_time", "stop_strings",
    "do_sample", "temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff",
    "repetition_penalty", "no_repeat_ngram_size", "bad_words_ids", "suppress_tokens", "begin_suppress_tokens",
    "forced_bos_token_id", "forced_eos_token_id", "sequence_bias", "exponential_decay_length_penalty",
    "renormalize_logits", "remove_invalid_values", "eos_token_id", "pad_token_id", "bos_token_id",
})  # fmt: skip

# Settings that are harmless only at these values: they may come from a generation_config as well.
_PLAIN = {
    "num_beams": (None, 1),
    "num_return_sequences": (None, 1),
    "guidance_scale": (None, 1, 1.0),
    "cache_implementation": (None, "dynamic"),
    "prompt_lookup_num_tokens": (None,),
    "assistant_early_exit": (None,),
    "penalty_alpha": (None, 0, 0.0),
    "dola_layers": (None,),
    "output_attentions": (None, False),
    "output_hidden_states": (None, False),
    "use_cache": (None, True),
}


def bypass_reason(
    model: PreTrainedModel, input_ids: torch.Tensor, arguments: Mapping[str, Any]
) -> str | None:
    """Why this call must run without reuse, or None when reuse gives what the plain call would."""
    if input_ids.ndim != 2 or input_ids.shape[0] != 1:
        return "batch"
    for name in arguments:
        if name not in _HARMLESS and name not in _PLAIN:
            return f"argument_{name}"
    config: GenerationConfig = arguments.get("generation_config") or model.generation_config
    for name, plain in _PLAIN.items():
        if arguments.get(name, getattr(config, name, None)) not in plain:
            return f"argument_{name}"
    mask = arguments.get("attention_mask")
    if mask is not None:
        return None if mask.shape == input_ids.shape and bool(mask.bool().all()) else "attention_mask"
    # Without a mask, transformers hides pad tokens that stand in the prompt, unless pad and end are one token.
    pad = arguments.get("pad_token_id", config.pad_token_id)
    ends = arguments.get("eos_token_id", config.eos_token_id)
    ends = ends if isinstance(ends, list) else [ends]
    if pad is not None and pad not in ends and bool((input_ids == pad).any()):
        return "attention_mask"
    return None
