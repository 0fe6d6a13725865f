"""Compares settings and buffers of modules with what the config implies."""

from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import nn
from transformers import PreTrainedConfig

from kvstore_client.engines.transformers.identity.reference import ReferenceModule
from kvstore_client.reuse.identity import Refusal
from kvstore_codec.model_spec import Scalar, weights_digest

# Settings that no supported forward pass in evaluation mode reads: RoPE whose frequencies change with the length is not
# supported. Users set some of them after loading (`pad_token_id`, `max_position_embeddings`).
_WITHOUT_EFFECT = frozenset({
    "all_tied_weights_keys", "generation_config", "gradient_checkpointing", "kernel_config", "loss_type",
    "max_seq_len_cached", "name_or_path", "original_max_seq_len", "padding_idx", "vocab_size",
})  # fmt: skip

_CAST_WHEN_USED = frozenset({"embed_scale"})
"""Buffers that the model casts to its weights' dtype before use: their own dtype does not matter."""

_SAME_FREQUENCY = 2**-21
"""Relative tolerance: four units in the last place of float32. Devices compute powers differently; bfloat16 rounds by
2**-9."""

_MISSING = object()


class Deviation(NamedTuple):
    """A setting or buffer with another value than implied, as an entry of `ModelSpec.numerics`."""

    name: str
    value: Scalar


def differences(
    name: str, module: nn.Module, implied: ReferenceModule, config: PreTrainedConfig
) -> Iterator[Deviation | Refusal]:
    """How this module differs from the implied one. Another float, or other values in a buffer of the same shape,
    become part of the name (Deviation): the computation is the same. Any other difference is refused."""
    actual = vars(module)
    if module.training and implied.children:  # only modules with children have dropout
        yield _refused(name, "training", actual=True, implied=False)
    own_config = actual.get("config", config)
    if own_config is not config and vars(own_config) != vars(config):
        yield Refusal("changed_setting", f"{name or 'the decoder'} has another config than the model")
    for key, expected in implied.settings.items():
        value = actual.get(key, _MISSING)
        if key in _WITHOUT_EFFECT or _same(value, expected):
            continue
        if isinstance(expected, float) and isinstance(value, float | int) and not isinstance(value, bool):
            if value != expected:
                yield Deviation(_path(name, key), float(value))
        else:
            yield _refused(name, key, value, expected)
    yield from _buffer_differences(name, module, implied)


def _buffer_differences(
    name: str, module: nn.Module, implied: ReferenceModule
) -> Iterator[Deviation | Refusal]:
    for key, expected in implied.buffers.items():
        buffer = module._buffers.get(key)
        if buffer is None or buffer.shape != expected.shape:
            yield _refused(name, key, None if buffer is None else tuple(buffer.shape), tuple(expected.shape))
    for key in sorted(module._non_persistent_buffers_set):
        buffer, expected_buffer = module._buffers.get(key), implied.buffers.get(key)
        if buffer is None:
            continue
        if key in _CAST_WHEN_USED and isinstance(module.weight, torch.Tensor):
            buffer = buffer.to(module.weight.dtype)
            expected_buffer = None if expected_buffer is None else expected_buffer.to(buffer.dtype)
        if expected_buffer is None or not _same_buffer(buffer, expected_buffer):
            yield Deviation(_path(name, key), weights_digest([(_path(name, key), buffer)]).hex())


def _same(value: object, expected: object) -> bool:
    if value is expected:
        return True
    if isinstance(value, partial) and isinstance(expected, partial):
        return (value.func, value.args, value.keywords) == (expected.func, expected.args, expected.keywords)
    return type(value) is type(expected) and not isinstance(value, torch.Tensor) and bool(value == expected)


def _same_buffer(buffer: torch.Tensor, expected: torch.Tensor) -> bool:
    if buffer.dtype != expected.dtype or buffer.shape != expected.shape or buffer.is_meta:
        return False
    return torch.allclose(buffer.detach().cpu(), expected, rtol=_SAME_FREQUENCY, atol=0.0)


def _path(name: str, key: str) -> str:
    return f"{name}.{key}" if name else key


def _refused(name: str, key: str, actual: object, implied: object) -> Refusal:
    shown = "missing" if actual is _MISSING else repr(actual)[:80]
    return Refusal(
        "changed_setting", f"{_path(name, key)} is {shown}; its config implies {repr(implied)[:80]}"
    )
