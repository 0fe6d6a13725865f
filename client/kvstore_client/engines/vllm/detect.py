"""Recognise the layout of a registered KV tensor, and check it against the engine before KV is exchanged."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from kvstore_client.engines.vllm.layout import (
    AmxCpuLayout,
    BlockLayout,
    PackedLayout,
    RowMajorCpuLayout,
    SeparateLayout,
)
from kvstore_codec.errors import UnsupportedEngineError

_CPU_BACKEND = "CPU_ATTN"
_GPU_BACKENDS = ("FLASH_ATTN", "FLASHINFER", "FLEX_ATTENTION", "TRITON_ATTN")
_ROW_MAJOR_KERNELS = ("vec", "vec16")

EngineWrite = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None]
"""Writes keys and values, `[tokens, kv_heads, head_dim]` each, into one layer's KV tensor with the engine's own kernel.
The third tensor holds the slot of each token: its block times the tokens of a block, plus its place in the block."""


@dataclass(frozen=True, slots=True)
class LayerCache:
    """What the engine's KV cache specification says about one layer."""

    block_tokens: int
    """Tokens in one block of the scheduler."""
    kv_heads: int
    """KV heads of this tensor-parallel rank."""
    head_dim: int
    dtype: torch.dtype
    """The model's dtype."""


def detect(tensor: torch.Tensor, cache: LayerCache, backend: str, kernel: str | None = None) -> BlockLayout:
    """The layout of a layer's registered KV tensor.

    `backend` is the name of the attention backend. `kernel` is the instruction set of the CPU backend's kernels, which
    decides how they pack a block. Raises UnsupportedEngineError, with the reason, for anything unknown.
    """
    if tensor.dtype != cache.dtype:
        raise UnsupportedEngineError(
            f"the KV cache holds {tensor.dtype}, but the model computes in {cache.dtype}: quantised KV caches are not "
            "supported; start vLLM with --kv-cache-dtype auto"
        )
    if backend == _CPU_BACKEND:
        return _cpu_layout(tensor, cache, kernel)
    if backend in _GPU_BACKENDS:
        return _gpu_layout(tensor, cache, backend)
    raise UnsupportedEngineError(
        f"the KV layout of vLLM's attention backend {backend} is unknown; the known backends are "
        f"{', '.join((_CPU_BACKEND, *_GPU_BACKENDS))}"
    )


def _cpu_layout(tensor: torch.Tensor, cache: LayerCache, kernel: str | None) -> BlockLayout:
    block_tokens, kv_heads, head_dim, split = _packed_shape(tensor, cache, _CPU_BACKEND)
    if tensor.stride()[2:] != (2 * head_dim, 1):
        raise _unknown(tensor, cache, _CPU_BACKEND)
    if kernel in _ROW_MAJOR_KERNELS:
        return RowMajorCpuLayout(block_tokens, kv_heads, head_dim, split)
    if kernel == "amx" and cache.dtype is torch.bfloat16 and head_dim % 32 == 0 and block_tokens % 32 == 0:
        return AmxCpuLayout(block_tokens, kv_heads, head_dim, split)
    raise UnsupportedEngineError(
        f"vLLM's CPU kernels for the instruction set {kernel} pack {cache.dtype} KV with a head_dim of {head_dim} and "
        f"blocks of {block_tokens} tokens in an unknown way; known are {', '.join(_ROW_MAJOR_KERNELS)}, and amx with "
        "torch.bfloat16 and multiples of 32"
    )


def _gpu_layout(tensor: torch.Tensor, cache: LayerCache, backend: str) -> BlockLayout:
    if tensor.dim() != 5:
        return PackedLayout(*_packed_shape(tensor, cache, backend))
    two, _, block_tokens, kv_heads, head_dim = tensor.shape
    if (two, kv_heads, head_dim) != (2, cache.kv_heads, cache.head_dim) or cache.block_tokens % block_tokens:
        raise _unknown(tensor, cache, backend)
    return SeparateLayout(block_tokens, kv_heads, head_dim, cache.block_tokens // block_tokens)


def _packed_shape(tensor: torch.Tensor, cache: LayerCache, backend: str) -> tuple[int, int, int, int]:
    """Fields of the layout of a tensor `[blocks, kv_heads, block_tokens, 2 * head_dim]`."""
    if tensor.dim() != 4:
        raise _unknown(tensor, cache, backend)
    _, kv_heads, block_tokens, content = tensor.shape
    if (kv_heads, content) != (cache.kv_heads, 2 * cache.head_dim) or cache.block_tokens % block_tokens:
        raise _unknown(tensor, cache, backend)
    return block_tokens, kv_heads, cache.head_dim, cache.block_tokens // block_tokens


def _unknown(tensor: torch.Tensor, cache: LayerCache, backend: str) -> UnsupportedEngineError:
    return UnsupportedEngineError(
        f"a KV tensor of shape {tuple(tensor.shape)} and strides {tensor.stride()} is unknown for vLLM's attention "
        f"backend {backend} with {cache.kv_heads} KV heads, head_dim {cache.head_dim} and blocks of "
        f"{cache.block_tokens} tokens"
    )


@torch.inference_mode()
def verify(layout: BlockLayout, tensor: torch.Tensor, spare_block: int, engine_write: EngineWrite) -> None:
    """Let the engine's own kernel write one block, and read it back. Raises UnsupportedEngineError when other KV is
    read than was written. `spare_block` is a block of the scheduler that no request uses; it holds zeros afterwards."""
    tokens = layout.block_tokens * layout.split
    generator = torch.Generator(device="cpu").manual_seed(0)
    shape = (layout.kv_heads, tokens, layout.head_dim)
    keys, values = (
        torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu").to(tensor)
        for _ in range(2)
    )
    slots = torch.arange(spare_block * tokens, (spare_block + 1) * tokens, device=tensor.device)
    engine_write(keys.transpose(0, 1).contiguous(), values.transpose(0, 1).contiguous(), slots)
    found_keys, found_values = layout.read(tensor, [spare_block], 0, tokens)
    same = torch.equal(found_keys, keys) and torch.equal(found_values, values)
    zeros = torch.zeros_like(keys)
    layout.write(tensor, [spare_block], 0, zeros, zeros)
    if not same:
        raise UnsupportedEngineError(
            f"{type(layout).__name__} reads other KV from vLLM's memory of shape {tuple(tensor.shape)} than was "
            "written: this version of vLLM packs blocks in another way"
        )
