"""Keys are turned to their positions and back. tests/vllm compares the rotation with vLLM's kernels."""

import pytest
import torch

from kvstore_client.engines.vllm.rotation import KeyRotation, RotatedDestination
from kvstore_client.reuse.rotation import rotated
from kvstore_codec.errors import InvalidKVError
from kvstore_codec.rope import RotaryTable
from tests.client.chunks import SPEC
from tests.client.paged import PagedKV

pytestmark = pytest.mark.usefixtures("one_thread")

POSITIONS, HALF = 900, 8


def rotation(dtype: torch.dtype = torch.float32, scale: float = 1.0, half: int = HALF) -> KeyRotation:
    angles = torch.outer(torch.arange(POSITIONS).float(), 100.0 ** -(torch.arange(half) / half))
    return KeyRotation((scale * angles.cos()).to(dtype), (scale * angles.sin()).to(dtype))


def random_keys(tokens: int, dtype: torch.dtype, head_dim: int = 2 * HALF) -> torch.Tensor:
    generator = torch.Generator().manual_seed(tokens)
    return (3 * torch.randn(3, 2, tokens, head_dim, generator=generator)).to(dtype)


def test_it_is_the_rotation_of_transformers() -> None:
    mine, keys = rotation(), random_keys(100, torch.float32)
    both = (torch.cat((part, part), dim=-1) for part in (mine.cos, mine.sin))
    expected = rotated(keys, RotaryTable(*both).at(slice(37, 137)))
    mine.apply_(keys, slice(37, 137))
    torch.testing.assert_close(keys, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("scale", [1.0, 1.3], ids=["plain", "scaled"])
@pytest.mark.parametrize("head_dim", [2 * HALF, 3 * HALF], ids=["whole", "partial"])
def test_turning_back_gives_the_keys_up_to_one_rounding(
    dtype: torch.dtype, scale: float, head_dim: int
) -> None:
    keys = random_keys(200, dtype, head_dim)
    turned = keys.clone()
    rotation(dtype, scale).apply_(turned, slice(700, 900))
    assert torch.equal(turned[..., 2 * HALF :], keys[..., 2 * HALF :])
    assert not torch.equal(turned, keys)
    rotation(dtype, scale).undo_(turned, slice(700, 900))
    # A rounding of either channel of a pair shows in both.
    first, second = keys[..., :HALF].float(), keys[..., HALF : 2 * HALF].float()
    length = (first.square() + second.square()).sqrt().repeat(1, 1, 1, 2)
    error = (turned[..., : 2 * HALF].float() - keys[..., : 2 * HALF].float()).abs()
    assert bool((error <= 2 * torch.finfo(dtype).eps * length).all())


def test_other_positions_than_the_engine_has_are_refused() -> None:
    with pytest.raises(InvalidKVError, match="900 positions"):
        rotation().apply_(random_keys(8, torch.float32), slice(896, 904))


def test_blocks_hold_rotated_keys_and_the_same_values() -> None:
    paged = PagedKV(SPEC, 64, packed=False)
    turning = rotation(SPEC.dtype.torch, half=SPEC.head_dim // 2)
    destination = RotatedDestination(paged, turning)
    layers, tokens = slice(0, destination.layers), slice(10, 50)
    keys, values = destination.prepare(layers, tokens)
    generator = torch.Generator().manual_seed(0)
    keys.copy_(torch.randn(keys.shape, generator=generator))
    values.copy_(torch.randn(values.shape, generator=generator))
    expected = keys.clone()
    turning.apply_(expected, tokens)
    destination.complete(layers, tokens, keys, values)
    found_keys, found_values = paged.contiguous(64)
    assert torch.equal(found_keys[:, :, tokens], expected)
    assert torch.equal(found_values[:, :, tokens], values)
    assert bool((found_keys[:, :, :10] == -1).all())
