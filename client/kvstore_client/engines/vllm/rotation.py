"""RoPE of the engine's keys: undone when KV is stored before RoPE, and redone when such KV is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from kvstore_client.fetch.destination import DestinationInFront
from kvstore_codec.errors import InvalidKVError, UnsupportedEngineError
from kvstore_codec.model_spec import RopeSpec

_AT_ONCE = 1 << 16
"""Number of values rotated at once, so that the scratch memory of 8 bytes each stays in the processor's cache."""
_MOST_ROUNDINGS = 16
"""Largest difference between two ways to rotate keys of about 1, in units of the dtype's relative precision."""


@dataclass(frozen=True, slots=True)
class KeyRotation:
    """Rotates keys as vLLM's kernels do: in float32, rounded once to the keys' dtype.

    The first `2 * half` channels of a head are rotated as two halves (RoFormer, eq. 34); the others stay as they are.
    """

    cos: torch.Tensor
    """By position, `[positions, half]`, in host memory and in the dtype in which the engine keeps it."""
    sin: torch.Tensor
    """Like `cos`. Some kinds of RoPE scale both, so that the sum of their squares is not 1."""

    def apply_(self, keys: torch.Tensor, tokens: slice) -> None:
        """Rotate keys before RoPE, `[layers, kv_heads, tokens, head_dim]`, to the positions `tokens`, in place. Raises
        InvalidKVError for positions that the engine's table does not have."""
        _turn_(keys, *self._at(tokens))

    def undo_(self, keys: torch.Tensor, tokens: slice) -> None:
        """The inverse of `apply_`, up to rounding."""
        cos, sin = self._at(tokens)
        scale = cos.square() + sin.square()  # not 1 where cos and sin are rounded or scaled
        _turn_(keys, cos / scale, -sin / scale)

    def _at(self, tokens: slice) -> tuple[torch.Tensor, torch.Tensor]:
        if not 0 <= tokens.start <= tokens.stop <= len(self.cos):
            raise InvalidKVError(
                f"the engine has rotations for {len(self.cos)} positions, not for {tokens.start} to {tokens.stop}"
            )
        return self.cos[tokens].float(), self.sin[tokens].float()


def _turn_(keys: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
    if keys.numel() > _AT_ONCE and len(keys) > 1:
        for layer in keys:
            _turn_(layer[None], cos, sin)
        return
    half = cos.shape[-1]
    given = keys[..., : 2 * half].float()
    turned = given * torch.cat((cos, cos), dim=-1)
    turned[..., :half].addcmul_(given[..., half:], sin, value=-1)
    turned[..., half:].addcmul_(given[..., :half], sin)
    keys[..., : 2 * half] = turned


@dataclass(frozen=True, slots=True)
class RotatedDestination(DestinationInFront):
    """Gives `inner` keys after RoPE where a fetch brings them before RoPE. A `Destination` of a fetch."""

    rotation: KeyRotation

    def complete(self, layers: slice, tokens: slice, keys: torch.Tensor, values: torch.Tensor) -> None:
        self.rotation.apply_(keys, tokens)
        self.inner.complete(layers, tokens, keys, values)


def engine_rotation(rope: RopeSpec, head_dim: int) -> KeyRotation:
    """The rotation of the model that vLLM has loaded in this process, with the very numbers that its kernels use.
    Rotates a probe with vLLM and compares. Raises UnsupportedEngineError, with the reason, for a model whose keys are
    rotated in another way."""
    from vllm.model_executor.layers import rotary_embedding

    modules = list(getattr(rotary_embedding, "_ROPE_DICT", {}).values())
    if len(modules) != 1:
        raise UnsupportedEngineError(
            f"lossy KV needs the model's rotary embedding, and vLLM has {len(modules)} of them; one is supported"
        )
    found = rotation_of(modules[0], rope, head_dim)
    _verify(found, modules[0], head_dim)
    return found


def rotation_of(module: Any, rope: RopeSpec, head_dim: int) -> KeyRotation:
    """The rotation by one of vLLM's rotary embeddings. Raises UnsupportedEngineError."""
    cache = getattr(module, "cos_sin_cache", None)
    described = getattr(module, "head_size", None), getattr(module, "rotary_dim", None)
    in_halves = getattr(module, "is_neox_style", False) and described == (head_dim, rope.rotary_dim)
    if not isinstance(cache, torch.Tensor) or cache.shape[1:] != (rope.rotary_dim,) or not in_halves:
        raise UnsupportedEngineError(
            f"lossy KV of a model with vLLM's {type(module).__name__} is not supported: its keys are not rotated as "
            f"two halves of {rope.rotary_dim} of {head_dim} channels"
        )
    cos, sin = cache.detach().cpu().chunk(2, dim=-1)
    return KeyRotation(cos, sin)


@torch.inference_mode()
def _verify(rotation: KeyRotation, module: Any, head_dim: int) -> None:
    device, dtype = module.cos_sin_cache.device, module.cos_sin_cache.dtype
    last = len(rotation.cos) - 1
    positions = torch.tensor([0, 1, last // 2, last], dtype=torch.int64, device="cpu")
    generator = torch.Generator(device="cpu").manual_seed(0)
    probe = torch.randn((len(positions), head_dim), generator=generator, dtype=torch.float32, device="cpu")
    probe = probe.to(dtype)
    _, turned = module(positions.to(device), probe.clone().to(device), probe.clone().to(device))
    ours = probe.clone()
    for row, position in enumerate(positions.tolist()):
        rotation.apply_(ours[None, None, row : row + 1], slice(position, position + 1))
    # Some of its kernels round each product. A wrong rotation is off by about 1.
    difference = (ours.float() - turned.cpu().float()).abs().max()
    if not float(difference) < _MOST_ROUNDINGS * torch.finfo(dtype).eps:
        raise UnsupportedEngineError(
            f"vLLM's {type(module).__name__} rotates keys in another way than its table of cosines says; lossy KV of "
            "this model is not supported"
        )
