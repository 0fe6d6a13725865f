"""The KV memory of one worker: the tensors that the engine registers, and how its blocks lie in them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from kvstore_client.engines.vllm.destination import PagedDestination
from kvstore_client.engines.vllm.detect import EngineWrite, LayerCache, detect, verify
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

    @property
    def blocks(self) -> int:
        """Number of the scheduler's blocks."""
        keys, _ = self.layout.views(self.tensors[0])
        return len(keys) // self.layout.split

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
    """The memory that the engine has registered. The engine's own kernels write the null block of each layer, and it is
    read back. Raises UnsupportedEngineError for a layout that is unknown, and for one that reads other KV."""
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
    for name, tensor in zip(names, memory.tensors, strict=True):
        verify(memory.layout, tensor, _NULL_BLOCK, _engine_write(_layer(vllm_config, name)))
    return memory


def _engine_write(layer: Any) -> EngineWrite:
    """Writes as each forward pass does: the layer's backend, into the memory that the layer itself uses."""

    def write(keys: torch.Tensor, values: torch.Tensor, slots: torch.Tensor) -> None:
        try:
            layer.impl.do_kv_cache_update(layer, keys, values, layer.kv_cache, slots)
        except Exception as error:
            raise UnsupportedEngineError(
                f"vLLM's attention backend cannot write a block of its own KV cache: {error!r}"
            ) from error

    return write


def _layer(vllm_config: Any, name: str) -> Any:
    """An attention layer of the model."""
    return vllm_config.compilation_config.static_forward_context[name]


def _backend(vllm_config: Any, layer_name: str, cache: LayerCache) -> tuple[str, str | None]:
    """Name of a layer's attention backend, and of its kernels on a CPU."""
    backend = str(_layer(vllm_config, layer_name).get_attn_backend().get_name())
    if backend != "CPU_ATTN":
        return backend, None
    from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

    return backend, _get_attn_isa(cache.dtype, cache.block_tokens, cache.head_dim)
