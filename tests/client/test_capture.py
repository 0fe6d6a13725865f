"""Keys taken before RoPE and rotated on restore are the model's own, bit for bit."""

import pytest
import torch
from transformers import DynamicCache

from kvstore_client.engines.transformers.cache import empty_cache
from kvstore_client.engines.transformers.capture import install_hooks
from kvstore_client.engines.transformers.rotary import rotary_tables
from kvstore_client.reuse.capture import KeyCapture
from kvstore_codec.rope import RotaryTable, rotate_, rotate_layers_
from tests.client.models import FAMILIES, random_prompt, tiny_model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", FAMILIES)
def test_captured_keys_rotate_to_the_cached_ones(family: str, dtype: torch.dtype) -> None:
    model = tiny_model(family, dtype)
    layers = model.config.num_hidden_layers
    hooks = install_hooks(model)
    capture = KeyCapture(layers, first_token=0)
    cache = empty_cache(capture, layers)
    prompt = random_prompt(300)
    with torch.inference_mode(), capture.active():
        model(prompt[:, :170], past_key_values=cache)
        for token in range(170, 173):
            model(prompt[:, token : token + 1], past_key_values=cache)
        model(prompt[:, 173:], past_key_values=cache)
    for layer, table in enumerate(rotary_tables(model, 300, dtype, "cpu")):
        for begin, end in ((0, 300), (100, 171), (165, 180), (299, 300)):
            keys = capture.keys(layer, begin, end).clone()
            rotate_(keys, table.at(slice(begin, end)))
            assert torch.equal(keys, cache.layers[layer].keys[0, :, begin:end])
    for hook in hooks:
        hook.remove()


def test_only_passes_through_this_cache_are_captured() -> None:
    """Passes before, after and in between that go through other caches, or none, leave no trace."""
    model = tiny_model()
    install_hooks(model)
    install_hooks(model)
    capture = KeyCapture(5, first_token=0)
    cache = empty_cache(capture, 5)
    with torch.inference_mode():
        model(random_prompt(8))
        with capture.active():
            model(random_prompt(4), past_key_values=cache)
            model(random_prompt(8))
            model(random_prompt(2, seed=1), past_key_values=cache)
            model(random_prompt(8), past_key_values=DynamicCache())
        model(random_prompt(8))
    assert capture.reaches(6)
    assert not capture.reaches(7)
    assert capture.keys(0, 0, 100).shape == (2, 6, 16)


def test_rotation_works_on_strided_views_and_leaves_unrotated_channels() -> None:
    keys = torch.randn(3, 2, 10, 24)
    before = keys.clone()
    cos, sin = torch.randn(10, 8), torch.randn(10, 8)
    cos, sin = torch.cat([cos, cos], -1), torch.cat([sin, sin], -1)
    rotate_(keys[:, :, 2:7], RotaryTable(cos, sin).at(slice(2, 7)))
    assert torch.equal(keys[:, :, :2], before[:, :, :2])
    assert torch.equal(keys[:, :, 7:], before[:, :, 7:])
    assert torch.equal(keys[..., 16:], before[..., 16:])
    half = before[:, :, 2:7, :16]
    turned = torch.cat([-half[..., 8:], half[..., :8]], -1)
    expected = half * cos[2:7] + turned * sin[2:7]
    assert torch.equal(keys[:, :, 2:7, :16], expected)


def test_more_keys_than_are_rotated_at_once_are_rotated_all() -> None:
    keys = torch.randn(4, 3, 700, 64)
    angles = torch.rand(700, 32).repeat(1, 2)
    turned = torch.cat([-keys[..., 32:], keys[..., :32]], -1)
    expected = keys * angles.cos() + turned * angles.sin()
    rotate_(keys, RotaryTable(angles.cos(), angles.sin()))
    assert torch.equal(keys, expected)


def test_each_layer_is_rotated_by_its_own_table() -> None:
    near, far = (RotaryTable(angles.cos(), angles.sin()) for angles in torch.rand(2, 20, 8).repeat(1, 1, 2))
    tables = (near, near, far, near, far, far)
    keys = torch.randn(6, 2, 5, 16)
    expected = keys.clone()
    for layer, table in enumerate(tables):
        rotate_(expected[layer], table.at(slice(3, 8)))
    rotate_layers_(keys, tables, slice(3, 8))
    assert torch.equal(keys, expected)
