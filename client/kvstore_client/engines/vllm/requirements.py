"""What an engine must be for the connector to serve it. Anything else is refused when the engine starts."""

from typing import Any

from kvstore_codec.errors import UnsupportedEngineError
from kvstore_codec.identity import CHUNK_TOKENS
from kvstore_codec.model_spec import ModelSpec

_LOAD_FORMATS = ("auto", "hf", "safetensors", "fastsafetensors", "instanttensor", "runai_streamer")
"""Those that load the checkpoint's safetensors files as they are."""


def require_configuration(vllm_config: Any) -> None:
    """Raises UnsupportedEngineError, with the reason, for an engine whose KV the connector cannot name or read."""
    transfer, model = vllm_config.kv_transfer_config, vllm_config.model_config
    parallel, load_format = vllm_config.parallel_config, str(vllm_config.load_config.load_format)
    ranks = {
        "tensor parallelism": parallel.tensor_parallel_size,
        "pipeline parallelism": parallel.pipeline_parallel_size,
        "decode context parallelism": getattr(parallel, "decode_context_parallel_size", 1),
        "prefill context parallelism": getattr(parallel, "prefill_context_parallel_size", 1),
    }
    for what, size in ranks.items():
        if size != 1:
            raise UnsupportedEngineError(f"{what} over {size} ranks is not supported; one rank is")
    if transfer.kv_role != "kv_both":
        raise UnsupportedEngineError(f"kv_role {transfer.kv_role!r} is not supported; set kv_role to kv_both")
    if transfer.kv_load_failure_policy != "recompute":
        raise UnsupportedEngineError(
            "kv_load_failure_policy is 'fail', so a request would fail when a storage node does; add "
            '"kv_load_failure_policy": "recompute" to --kv-transfer-config'
        )
    if model.quantization is not None:
        raise UnsupportedEngineError(
            f"weights quantised with {model.quantization} are not supported: the checkpoint's bytes do not name them"
        )
    if load_format not in _LOAD_FORMATS:
        raise UnsupportedEngineError(
            f"load format {load_format!r} is not supported, because the weights are not those of the checkpoint's "
            "safetensors files; use --load-format auto"
        )


def require_cache(kv_cache_config: Any, spec: ModelSpec) -> int:
    """Tokens in a block of the scheduler. Raises UnsupportedEngineError unless the engine keeps the KV of all layers
    of the model, for all tokens, in one group of blocks that chunks are made of."""
    groups = kv_cache_config.kv_cache_groups
    if len(groups) != 1:
        raise UnsupportedEngineError(f"{len(groups)} groups of KV cache blocks are not supported; one is")
    layers, cache = len(groups[0].layer_names), groups[0].kv_cache_spec
    name = type(cache).__name__
    if name != "FullAttentionSpec" or cache.sliding_window is not None or any(spec.sliding_windows):
        raise UnsupportedEngineError(
            f"KV of {name} (sliding windows: {any(spec.sliding_windows)}) is not supported; full attention in all "
            "layers is"
        )
    if getattr(cache, "non_causal", False) or getattr(cache, "attention_chunk_size", None):
        raise UnsupportedEngineError(
            "tokens of this model attend to later tokens, or only to those of their own window, so that KV of a prefix "
            "depends on what follows it; causal attention to all tokens before is supported"
        )
    found = layers, cache.num_kv_heads, cache.head_size, cache.dtype
    if found != (spec.layers, spec.kv_heads, spec.head_dim, spec.dtype.torch):
        raise UnsupportedEngineError(
            f"the engine keeps KV of {layers} layers, {cache.num_kv_heads} KV heads, head_dim {cache.head_size} and "
            f"{cache.dtype}; the checkpoint has {spec.layers}, {spec.kv_heads}, {spec.head_dim} and {spec.dtype}. "
            "Draft models and quantised KV caches are not supported"
        )
    block_tokens = int(cache.block_size)
    if CHUNK_TOKENS % block_tokens:
        raise UnsupportedEngineError(
            f"blocks of {block_tokens} tokens are not supported: a chunk has {CHUNK_TOKENS} tokens, and blocks must "
            "divide it"
        )
    return block_tokens
