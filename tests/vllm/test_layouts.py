"""The layouts agree with the CPU kernels of the installed vLLM."""

import pytest
import torch

from kvstore_client.engines.vllm.detect import EngineWrite, LayerCache, detect, verify
from kvstore_client.engines.vllm.layout import AmxCpuLayout, BlockLayout, RowMajorCpuLayout
from kvstore_codec.errors import UnsupportedEngineError

pytestmark = pytest.mark.vllm

BLOCKS, HEADS = 5, 3

needs_amx_kernels = pytest.mark.skipif(
    not torch.cpu._is_avx512_bf16_supported(),
    reason="vLLM loads its kernels for AMX on processors with AVX512_BF16 only",
)


def cache_writer(tensor: torch.Tensor, kernel: str) -> EngineWrite:
    """Writes KV as `CPUAttentionBackendImpl.do_kv_cache_update` does."""
    from vllm import _custom_ops as ops

    blocks, heads, tokens, _ = tensor.shape
    key_cache, value_cache = tensor.view(blocks, heads, 2 * tokens, -1).chunk(2, dim=2)

    def write(keys: torch.Tensor, values: torch.Tensor, slots: torch.Tensor) -> None:
        ops.cpu_attn_reshape_and_cache(keys, values, key_cache, value_cache, slots, kernel)

    return write


def engine_kernel(cache: LayerCache) -> str:
    """The kernels that the engine chooses on this machine."""
    from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

    kernel: str = _get_attn_isa(cache.dtype, cache.block_tokens, cache.head_dim, "auto")
    return kernel


def empty(cache: LayerCache) -> torch.Tensor:
    return torch.zeros(BLOCKS, HEADS, cache.block_tokens, 2 * cache.head_dim, dtype=cache.dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(("block_tokens", "head_dim"), [(128, 64), (32, 128), (64, 80), (128, 256)])
def test_the_engines_own_choice_of_kernel_is_read_back(
    dtype: torch.dtype, block_tokens: int, head_dim: int
) -> None:
    cache = LayerCache(block_tokens, HEADS, head_dim, dtype)
    kernel, tensor = engine_kernel(cache), empty(cache)
    layout = detect(tensor, cache, "CPU_ATTN", kernel)
    verify(layout, tensor, 3, cache_writer(tensor, kernel))


@pytest.mark.parametrize(
    ("kernel", "dtype", "kind"),
    [
        ("vec", torch.bfloat16, RowMajorCpuLayout),
        ("vec", torch.float32, RowMajorCpuLayout),
        ("vec16", torch.bfloat16, RowMajorCpuLayout),
        ("vec16", torch.float32, RowMajorCpuLayout),
        pytest.param("amx", torch.bfloat16, AmxCpuLayout, marks=needs_amx_kernels),
    ],
)
def test_every_known_kernel_packs_as_its_layout_says(
    kernel: str, dtype: torch.dtype, kind: type[BlockLayout]
) -> None:
    """Packing for AMX needs no AMX instructions. Slots come in any order."""
    cache = LayerCache(64, HEADS, 64, dtype)
    tensor = empty(cache)
    layout = detect(tensor, cache, "CPU_ATTN", kernel)
    assert type(layout) is kind
    write = cache_writer(tensor, kernel)
    verify(layout, tensor, 0, write)
    generator = torch.Generator().manual_seed(0)
    slots = torch.randperm(BLOCKS * 64, generator=generator)
    keys, values = (torch.randn(len(slots), HEADS, 64, generator=generator).to(dtype) for _ in range(2))
    write(keys, values, slots)
    for found, written in zip(layout.read(tensor, range(BLOCKS), 0, len(slots)), (keys, values), strict=True):
        assert torch.equal(found[:, slots], written.transpose(0, 1))


@pytest.mark.parametrize(
    ("written", "backend", "kernel"),
    [
        pytest.param("amx", "CPU_ATTN", "vec", marks=needs_amx_kernels),
        ("vec", "CPU_ATTN", "amx"),
        ("vec", "FLASH_ATTN", None),
    ],
)
def test_another_packing_than_the_layouts_is_found_out(
    written: str, backend: str, kernel: str | None
) -> None:
    cache = LayerCache(64, HEADS, 64, torch.bfloat16)
    tensor = empty(cache)
    layout = detect(tensor, cache, backend, kernel)
    with pytest.raises(UnsupportedEngineError, match="packs blocks in another way"):
        verify(layout, tensor, 0, cache_writer(tensor, written))
