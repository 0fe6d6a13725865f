"""Description of everything that a model's KV depends on. Its digest is part of every chunk name."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, TypeAlias

from blake3 import blake3

from kvstore_codec import canonical
from kvstore_codec.errors import InvalidKVError, UnsupportedModelError

_SPEC_DOMAIN = b"kvstore.ModelSpec.v1"
_WEIGHTS_DOMAIN = b"kvstore.weights.v1"

if TYPE_CHECKING:  # storage nodes import this module too, and start a second faster without torch
    import torch

    # Inside KVDtype, the property `torch` hides the module.
    TorchDtype: TypeAlias = torch.dtype

Scalar = float | int | str | bool


class KVDtype(StrEnum):
    """Element types a KV cache may have."""

    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"
    FLOAT32 = "float32"

    @property
    def itemsize(self) -> int:
        """Bytes per value."""
        return 4 if self is KVDtype.FLOAT32 else 2

    @property
    def torch(self) -> TorchDtype:
        import torch

        found: TorchDtype = getattr(torch, self.value)
        return found

    @classmethod
    def of(cls, dtype: TorchDtype) -> KVDtype:
        """The KVDtype of a torch dtype. Raises InvalidKVError for a dtype that cannot be stored."""
        for known in cls:
            if known.torch == dtype:
                return known
        raise InvalidKVError(f"KV of {dtype} cannot be stored; use one of {', '.join(cls)}")


@dataclass(frozen=True, slots=True)
class RopeSpec:
    """Rotary embedding whose frequencies do not depend on the sequence length.

    `parameters` holds the parameters of the kind besides theta (such as scaling factors), sorted by name.
    """

    kind: str
    theta: float
    rotary_dim: int
    parameters: tuple[tuple[str, Scalar], ...] = ()

    def __post_init__(self) -> None:
        if list(self.parameters) != sorted(self.parameters):
            raise UnsupportedModelError("RoPE parameters must be sorted by name and named once")


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """Everything that two workers must agree on before one may use the other's KV.

    `kv_heads` counts the heads of this tensor-parallel rank. `sliding_windows` has one entry per layer
    (None: full attention), or is empty if every layer has full attention. `rope` is None for models
    without rotary embeddings; their KV can be reused only at its own position. `sliding_rope` is the RoPE of the layers
    with a window, if it differs from that of the other layers (Gemma 3).
    """

    model_id: str
    weights_digest: bytes
    layers: int
    kv_heads: int
    head_dim: int
    dtype: KVDtype
    rope: RopeSpec | None
    sliding_windows: tuple[int | None, ...] = ()
    tp_rank: int = 0
    tp_size: int = 1
    numerics: tuple[tuple[str, Scalar], ...] = ()
    """Settings besides the weights that KV values depend on (activation, norm epsilon), sorted by name."""
    sliding_rope: RopeSpec | None = None
    digest: bytes = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        canonical.require_digest("weights_digest", self.weights_digest)
        if min(self.layers, self.kv_heads, self.head_dim) < 1:
            raise UnsupportedModelError(
                f"{self.model_id}: layers, kv_heads and head_dim must be positive, "
                f"got {self.layers}, {self.kv_heads}, {self.head_dim}"
            )
        if len(self.sliding_windows) not in (0, self.layers):
            raise UnsupportedModelError(
                f"{self.model_id}: {len(self.sliding_windows)} sliding windows for {self.layers} layers"
            )
        if self.sliding_rope is not None and not any(self.sliding_windows):
            raise UnsupportedModelError(
                f"{self.model_id}: RoPE for sliding windows is given, but no layer has a window"
            )
        if not 0 <= self.tp_rank < self.tp_size:
            raise UnsupportedModelError(
                f"{self.model_id}: tensor-parallel rank {self.tp_rank} of {self.tp_size} does not exist"
            )
        object.__setattr__(self, "digest", canonical.digest(*self._fields()))

    @property
    def kv_bytes_per_token(self) -> int:
        return 2 * self.layers * self.kv_heads * self.head_dim * self.dtype.itemsize

    def _fields(self) -> Iterable[bytes]:
        yield _SPEC_DOMAIN
        yield self.model_id.encode()
        yield self.weights_digest
        for number in (self.layers, self.kv_heads, self.head_dim):
            yield canonical.integer(number)
        yield self.dtype.value.encode()
        yield b"" if self.rope is None else _rope_bytes(self.rope)
        # 0 stands for full attention: a real window is never empty.
        yield b"".join(canonical.integer(window or 0) for window in self.sliding_windows)
        yield canonical.integer(self.tp_rank)
        yield canonical.integer(self.tp_size)
        yield _named_bytes(self.numerics)
        if self.sliding_rope is not None:
            yield _rope_bytes(self.sliding_rope)


def _rope_bytes(rope: RopeSpec) -> bytes:
    return canonical.length_prefixed(
        rope.kind.encode(), _scalar_bytes(rope.theta), canonical.integer(rope.rotary_dim)
    ) + _named_bytes(rope.parameters)


def _named_bytes(named: Iterable[tuple[str, Scalar]]) -> bytes:
    return canonical.length_prefixed(
        *(part for name, value in named for part in (name.encode(), _scalar_bytes(value)))
    )


def _scalar_bytes(value: Scalar) -> bytes:
    # Configs write the same factor as 8 or 8.0, so every number is serialised as f64.
    if isinstance(value, bool):
        return b"b" + bytes([value])
    if isinstance(value, str):
        return b"s" + value.encode()
    return b"n" + struct.pack("<d", value)


def weights_digest(tensors: Iterable[tuple[str, torch.Tensor]]) -> bytes:
    """blake3 over the name, dtype, shape and bytes of every tensor, sorted by name.

    `tensors` is for example `model.state_dict().items()`; tensors may be on any device. Copies at most one tensor at a
    time, and only if it is not contiguous or not in host memory. Hashes on all cores.

    Raises UnsupportedModelError for a tensor whose bytes are not available, before any tensor is hashed.
    """
    named = dict(tensors)
    for name, tensor in sorted(named.items()):
        _require_bytes(name, tensor)
    return streamed_weights_digest(named, named.__getitem__)


def streamed_weights_digest(names: Iterable[str], load: Callable[[str], torch.Tensor]) -> bytes:
    """The `weights_digest` of tensors that `load` returns one at a time, in the order of their names.

    Raises UnsupportedModelError for the first tensor whose bytes are not available.
    """
    import torch

    # These threads belong to this hasher. The threads of blake3.AUTO are shared and hang in a forked child.
    hasher = blake3(canonical.length_prefixed(_WEIGHTS_DOMAIN), max_threads=os.cpu_count() or 1)
    for name in sorted(names):
        tensor = load(name)
        _require_bytes(name, tensor)
        shape = b"".join(canonical.integer(size) for size in tensor.shape)
        data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        hasher.update(canonical.length_prefixed(name.encode(), str(tensor.dtype).encode(), shape))
        hasher.update(canonical.integer(data.numel()))
        if data.numel():
            hasher.update(data.numpy().data)
    return hasher.digest()


def _require_bytes(name: str, tensor: object) -> None:
    reason = _why_no_bytes(tensor)
    if reason is not None:
        raise UnsupportedModelError(f"the weight {name!r} {reason}")


def _why_no_bytes(tensor: object) -> str | None:
    """The reason why a weight cannot be hashed; None if it can."""
    import torch

    if not isinstance(tensor, torch.Tensor):
        return (
            f"is a {type(tensor).__name__}, not a tensor, as in modules with dynamic quantisation; use the "
            "model before quantisation"
        )
    if type(tensor).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
        return f"is a {type(tensor).__name__}, whose bytes are not those of a plain tensor"
    if tensor.is_meta:
        return "has no bytes: it is on the meta device, like offloaded weights; load the model without offloading"
    if tensor.layout != torch.strided:
        return f"is sparse ({tensor.layout}); make it dense"
    if tensor.is_quantized:
        return f"is quantised ({tensor.dtype}); dequantise the model"
    return None
