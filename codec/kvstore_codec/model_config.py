"""Makes the ModelSpec of a Hugging Face config."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kvstore_codec.errors import UnsupportedModelError
from kvstore_codec.model_spec import KVDtype, ModelSpec, RopeSpec, Scalar

# Model families in which all layers cache plain attention keys and values, with K = RoPE(k_proj(x)) (qwen3, gemma3:
# RoPE(norm(k_proj(x)))).
SUPPORTED_FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma3_text")

_DEFAULT_ROPE_THETA = 10000.0
_FIXED_ROPE_KINDS = ("default", "linear", "llama3", "yarn")
_LENGTH_DEPENDENT_ROPE_KINDS = ("dynamic", "longrope")
# Kinds that scale from the training length. Its default in transformers is the longest input.
_ROPE_KINDS_WITH_ORIGINAL_LENGTH = ("llama3", "yarn")
_NAMED_APART = ("rope_type", "type", "rope_theta", "partial_rotary_factor")

# Defaults for values that Gemma 3 configs may omit.
_GEMMA_THETA = 1_000_000.0
_GEMMA_SLIDING_THETA = 10000.0
_GEMMA_PATTERN = 6

_FOREIGN_KV = {
    "kv_lora_rank": "multi-head latent attention caches a latent, not keys and values",
    "linear_num_value_heads": "linear attention keeps a running state, not one KV per token",
    "ssm_cfg": "a state-space model keeps a running state, not one KV per token",
    "is_encoder_decoder": "cross-attention KV belongs to the encoder's input, not to the tokens",
    "use_bidirectional_attention": "its tokens attend to later ones, so the KV of a prefix depends on later text",
}

# Settings besides the weights that affect the KV of the supported families, sorted by name.
_NUMERICS = (
    "attn_logit_softcapping",
    "hidden_act",
    "hidden_activation",
    "query_pre_attn_scalar",
    "rms_norm_eps",
)


def spec_from_config(
    config: Mapping[str, Any], *, weights_digest: bytes, dtype: KVDtype, model_id: str | None = None
) -> ModelSpec:
    """Makes the ModelSpec of `config`, a Hugging Face config as a dict: of transformers 5 (`rope_parameters`) or older
    (`rope_theta`, `rope_scaling`). The default of `model_id` is the architecture's name, never a local path:
    workers with the model in different folders must agree, and `weights_digest` distinguishes models.

    Raises UnsupportedModelError, with the reason, if the KV cannot be described.
    """
    family = config.get("model_type")
    name = model_id or (config.get("architectures") or [family])[0] or "model"
    for key, reason in _FOREIGN_KV.items():
        if config.get(key):
            raise UnsupportedModelError(f"{name}: {reason}")
    if family not in SUPPORTED_FAMILIES:
        raise UnsupportedModelError(
            f"{name}: family {family!r} is not supported; supported are {', '.join(SUPPORTED_FAMILIES)}"
        )
    layers = _positive(config, "num_hidden_layers", name)
    heads = _positive(config, "num_attention_heads", name)
    head_dim = config.get("head_dim") or _positive(config, "hidden_size", name) // heads
    windows = _sliding_windows(config, layers, name)
    rope, sliding_rope = _ropes(config, head_dim, name)
    return ModelSpec(
        model_id=name,
        weights_digest=weights_digest,
        layers=layers,
        kv_heads=config.get("num_key_value_heads") or heads,
        head_dim=head_dim,
        dtype=dtype,
        rope=rope,
        sliding_windows=windows,
        numerics=tuple((key, config[key]) for key in _NUMERICS if config.get(key) is not None),
        sliding_rope=sliding_rope if windows and sliding_rope != rope else None,
    )


def _positive(config: Mapping[str, Any], key: str, name: str) -> int:
    value = config.get(key)
    if not isinstance(value, int) or value < 1:
        raise UnsupportedModelError(f"{name}: the config has no usable {key!r} (found {value!r})")
    return value


def _ropes(config: Mapping[str, Any], head_dim: int, name: str) -> tuple[RopeSpec, RopeSpec | None]:
    """RoPE of the layers, and of the layers with a sliding window if the config gives them separate parameters."""
    found: dict[str, Any] = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    theta = config.get("rope_theta")
    if config["model_type"] != "gemma3_text":
        return _rope(config, found, theta or _DEFAULT_ROPE_THETA, head_dim, name), None
    # transformers 5 has parameters per layer type. Older `rope_scaling` applies to full-attention layers only.
    full, sliding = found.get("full_attention", found), found.get("sliding_attention", {})
    sliding_theta = config.get("rope_local_base_freq") or _GEMMA_SLIDING_THETA
    return (
        _rope(config, full, theta or _GEMMA_THETA, head_dim, name),
        _rope(config, sliding, sliding_theta, head_dim, name),
    )


def _rope(
    config: Mapping[str, Any], parameters: Mapping[str, Any], theta: float, head_dim: int, name: str
) -> RopeSpec:
    found = dict(parameters)
    kind = found.get("rope_type") or found.get("type") or "default"
    if kind in _LENGTH_DEPENDENT_ROPE_KINDS:
        raise UnsupportedModelError(
            f"{name}: the frequencies of {kind!r} RoPE change with the sequence length, so KV of one request "
            "would be wrong in a longer one"
        )
    if kind not in _FIXED_ROPE_KINDS:
        raise UnsupportedModelError(
            f"{name}: RoPE kind {kind!r} is unknown; known are {', '.join(_FIXED_ROPE_KINDS)}"
        )
    if kind in _ROPE_KINDS_WITH_ORIGINAL_LENGTH:
        longest = config.get("original_max_position_embeddings") or config.get("max_position_embeddings")
        found.setdefault("original_max_position_embeddings", longest)
    named: list[tuple[str, Scalar]] = []
    for key, value in sorted(found.items()):
        if key in _NAMED_APART or value is None:
            continue
        if not isinstance(value, float | int | str | bool):
            raise UnsupportedModelError(
                f"{name}: RoPE parameter {key!r} is {value!r}, not a plain number or string"
            )
        named.append((key, value))
    partial = found.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0
    return RopeSpec(kind, float(found.get("rope_theta") or theta), int(head_dim * partial), tuple(named))


def _sliding_windows(config: Mapping[str, Any], layers: int, name: str) -> tuple[int | None, ...]:
    family, window = config["model_type"], config.get("sliding_window")
    # Llama has no windows. Qwen uses its window only if `use_sliding_window` is set; Mistral and Gemma always use it.
    if family == "llama" or window is None:
        return ()
    if family.startswith("qwen") and not config.get("use_sliding_window"):
        return ()
    if family == "mistral":
        return (window,) * layers
    kinds = config.get("layer_types") or _default_layer_types(config, layers)
    if len(kinds) != layers:
        raise UnsupportedModelError(f"{name}: layer_types names {len(kinds)} of {layers} layers")
    windows = tuple(window if kind == "sliding_attention" else None for kind in kinds)
    return windows if any(windows) else ()


def _default_layer_types(config: Mapping[str, Any], layers: int) -> list[str]:
    """Layer types for older configs, which do not have `layer_types`."""
    if config["model_type"] == "gemma3_text":
        pattern = config.get("sliding_window_pattern") or _GEMMA_PATTERN
        full = [(layer + 1) % pattern == 0 for layer in range(layers)]
    else:
        first_sliding = config.get("max_window_layers", layers)
        full = [layer < first_sliding for layer in range(layers)]
    return ["full_attention" if attends_to_all else "sliding_attention" for attends_to_all in full]
