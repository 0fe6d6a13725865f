"""The KV memory of one worker: the tensors that the engine registers, and how its blocks lie in them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from kvstore_client.engines.vllm.destination import PagedDestination
from kvstore_client.engines.vllm.detect import LayerCache, detect, verify
from kvstore_client.engines.vllm.layout import BlockLayout
from kvstore_codec.errors import UnsupportedEngineError
from kvstore_codec.model_spec import ModelSpec

_NULL_BLOCK = 0
"""vLLM gives this block to no request."""


@dataclass(frozen=True, slots=True)
class PagedMemory:
    """The tensors of all layers, in the order of the model's layers."""

    layout: BlockLayout
    tensors: tuple[torch.Tensor, ...]

    def destination(self, block_ids: Sequence[int]) -> PagedDestination:
        return PagedDestination(self.layout, self.tensors, block_ids)

    def read_layer(
        self, layer: int, block_ids: Sequence[int], tokens: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Copies of a layer's keys and values, `[kv_heads, tokens, head_dim]` each, from the first token of the first
        block on."""
        return self.layout.read(self.tensors[layer], block_ids, 0, tokens)


def registered_memory(
    vllm_config: Any, spec: ModelSpec, block_tokens: int, kv_caches: Mapping[str, torch.Tensor]
) -> PagedMemory:
    """The memory that the engine has registered. Writes the null block and reads it back. Raises
    UnsupportedEngineError for a layout that is unknown."""
    from vllm.model_executor.models.utils import extract_layer_index

    names = sorted(kv_caches, key=extract_layer_index)
    if [extract_layer_index(name) for name in names] != list(range(spec.layers)):
        raise UnsupportedEngineError(
            f"the engine registers KV of {len(names)} layers; {spec.layers} are expected"
        )
    cache = LayerCache(block_tokens, spec.kv_heads, spec.head_dim, spec.dtype.torch)
    layouts = {detect(kv_caches[name], cache, *_backend(vllm_config, name, cache)) for name in names}
    if len(layouts) != 1:
        raise UnsupportedEngineError(f"the engine lays KV out in {len(layouts)} ways; one is supported")
    memory = PagedMemory(layouts.pop(), tuple(kv_caches[name] for name in names))
    for tensor in memory.tensors:
        verify(memory.layout, tensor, _NULL_BLOCK)
    return memory


def _backend(vllm_config: Any, layer_name: str, cache: LayerCache) -> tuple[str, str | None]:
    """Name of a layer's attention backend, and of its kernels on a CPU."""
    layer = vllm_config.compilation_config.static_forward_context[layer_name]
    backend = str(layer.get_attn_backend().get_name())
    if backend != "CPU_ATTN":
        return backend, None
    from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

    return backend, _get_attn_isa(cache.dtype, cache.block_tokens, cache.head_dim)
