"""Decides which `generate` calls run without KV reuse, and why."""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation import GenerationMode

# Arguments that leave the prompt's KV as a plain prefill computes it. Calls with any other argument run without reuse:
# an unknown argument may change what the model computes, and a wrong answer is worse than a slow one.
_HARMLESS = frozenset({
    "attention_mask", "generation_config", "logits_processor", "stopping_criteria", "streamer", "tokenizer",
    "return_dict_in_generate", "output_scores", "output_logits", "use_cache",
    "max_length", "max_new_tokens", "min_length", "min_new_tokens", "max_time", "stop_strings",
    "do_sample", "temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff",
    "repetition_penalty", "no_repeat_ngram_size", "bad_words_ids", "suppress_tokens", "begin_suppress_tokens",
    "forced_bos_token_id", "forced_eos_token_id", "sequence_bias", "exponential_decay_length_penalty",
    "renormalize_logits", "remove_invalid_values", "eos_token_id", "pad_token_id", "bos_token_id",
})  # fmt: skip

# Settings that are harmless only at these values. A generation_config can hold them as well.
_PLAIN: Mapping[str, tuple[object, ...]] = {
    "num_return_sequences": (None, 1),
    "guidance_scale": (None, 1),
    # transformers ignores "hybrid", which older configs of sliding-window models name.
    "cache_implementation": (None, "dynamic", "hybrid"),
    "output_attentions": (None, False),
    "output_hidden_states": (None, False),
    "prefill_chunk_size": (None,),
    "token_healing": (None, False),
    "use_cache": (None, True),
}
# Arguments that select other decoding modes, which use the cache in their own ways.
_MODE = frozenset({
    "num_beams", "num_beam_groups", "penalty_alpha", "dola_layers", "constraints", "force_words_ids", "use_mtp",
    "prompt_lookup_num_tokens", "assistant_early_exit",
})  # fmt: skip
_PLAIN_MODES = (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)


def bypass_reason(
    model: PreTrainedModel, input_ids: torch.Tensor | None, arguments: Mapping[str, Any]
) -> str | None:
    """Why this call must run without reuse; None when reuse gives the same result as the plain call."""
    if (reason := mode_reason(model)) is not None:
        return reason
    if getattr(model, "peft_config", None) or getattr(model, "_hf_peft_config_loaded", False):
        return "adapter"  # no weight shows which adapter is active
    if input_ids is None or input_ids.ndim != 2 or input_ids.shape[0] != 1 or input_ids.shape[1] == 0:
        return "batch"
    for name in arguments:
        if name not in _HARMLESS and name not in _PLAIN and name not in _MODE:
            return f"argument_{name}"
    config = _effective_config(model, arguments)
    for name, plain in _PLAIN.items():
        if getattr(config, name, None) not in plain:
            return f"argument_{name}"
    mode = config.get_generation_mode()
    if mode not in _PLAIN_MODES:
        return f"mode_{mode.value}"
    return "attention_mask" if _hides_tokens(config, input_ids, arguments.get("attention_mask")) else None


def mode_reason(model: PreTrainedModel) -> str | None:
    """Why the current mode of the model, or of torch in the calling thread, forbids reuse; None when it does not."""
    if model.training:
        return "training"
    device = model.device.type  # offloaded weights are on meta, which has no autocast
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return "autocast"  # the cache would have another dtype than the model
    if _get_current_dispatch_mode_stack():
        return "dispatch_mode"
    function_modes = _get_current_function_mode_stack()  # type: ignore[no-untyped-call]
    if any(type(mode) is not DeviceContext for mode in function_modes):
        return "function_mode"
    return None


def _hides_tokens(config: GenerationConfig, input_ids: torch.Tensor, mask: torch.Tensor | None) -> bool:
    """Whether the model ignores some token of the prompt."""
    if mask is not None:
        return mask.shape != input_ids.shape or not bool((mask == 1).all())
    # Without a mask, transformers masks pad tokens in the prompt, unless the pad token is also an end token.
    pad, ends = config.pad_token_id, config.eos_token_id
    if pad is None or not bool((input_ids == pad).any()):
        return False
    return ends is None or int(pad) not in torch.as_tensor(ends, device="cpu").flatten().tolist()


def _effective_config(model: PreTrainedModel, arguments: Mapping[str, Any]) -> GenerationConfig:
    """The config that `generate` will use: arguments take precedence over the given config, and that over the
    model's."""
    config = copy.deepcopy(arguments.get("generation_config") or GenerationConfig())
    config.update(**model.generation_config.to_dict(), defaults_only=True)
    config.update(**{name: value for name, value in arguments.items() if name != "generation_config"})
    return config
