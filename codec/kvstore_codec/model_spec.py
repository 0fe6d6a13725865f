"""What a model's KV depends on, read from its config and weights; its digest is in every key."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import torch
from blake3 import blake3

from kvstore_codec import canonical
from kvstore_codec.errors import InvalidKVError, UnsupportedModelError

_SPEC_DOMAIN = b"kvstore.ModelSpec.v1"
_WEIGHTS_DOMAIN = b"kvstore.weights.v1"

# Families whose layers all cache plain attention keys and values, with K = RoPE(k_proj(x)) (qwen3: of the
# normed k_proj).
SUPPORTED_FAMILIES = ("llama", "mistral", "qwen2", "qwen3")

_DEFAULT_ROPE_THETA = 10000.0
_FIXED_ROPE_KINDS = ("default", "linear", "llama3", "yarn")
_LENGTH_DEPENDENT_ROPE_KINDS = ("dynamic", "longrope")
# Kinds that scale from the length the model was trained at; transformers defaults it to the longest input.
_ROPE_KINDS_WITH_ORIGINAL_LENGTH = ("llama3", "yarn")
_NAMED_APART = ("rope_type", "type", "rope_theta", "partial_rotary_factor")

_FOREIGN_KV = {
    "kv_lora_rank": "multi-head latent attention caches a latent, not keys and values",
    "linear_num_value_heads": "linear attention keeps a running state, not one KV per token",
    "ssm_cfg": "a state-space model keeps a running state, not one KV per token",
    "is_encoder_decoder": "cross-attention KV belongs to the encoder's input, not to the tokens",
}

# `KVDtype.torch` hides the module's name inside its class.
TorchDtype = torch.dtype
Scalar = float | int | str | bool


class KVDtype(StrEnum):
    """Element types a KV cache may have."""

    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"
    FLOAT32 = "float32"

    @property
    def itemsize(self) -> int:
        """Bytes per value."""
        return self.torch.itemsize

    @property
    def torch(self) -> TorchDtype:
        return _TORCH_DTYPES[self]

    @classmethod
    def of(cls, dtype: TorchDtype) -> KVDtype:
        """Raises InvalidKVError for a dtype that a KV cache cannot be stored in."""
        for known, torch_dtype in _TORCH_DTYPES.items():
            if torch_dtype == dtype:
                return known
        raise InvalidKVError(f"KV of {dtype} cannot be stored; use one of {', '.join(cls)}")


_TORCH_DTYPES = {
    KVDtype.BFLOAT16: torch.bfloat16,
    KVDtype.FLOAT16: torch.float16,
    KVDtype.FLOAT32: torch.float32,
}


@dataclass(frozen=True, slots=True)
class RopeSpec:
    """Rotary embedding whose frequencies do not depend on the sequence length.

    `parameters` holds what the kind needs besides theta (scaling factors...), sorted by name.
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

    `kv_heads` counts the heads this tensor-parallel rank holds. `sliding_windows` has one entry per layer
    (None: full attention) or is empty when every layer attends to everything. `rope` is None for models
    without rotary embeddings: their KV can be reused at its own position only.
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
        # 0 stands for "attends to everything": no real window is empty.
        yield b"".join(canonical.integer(window or 0) for window in self.sliding_windows)
        yield canonical.integer(self.tp_rank)
        yield canonical.integer(self.tp_size)
        yield _named_bytes(self.numerics)


def _rope_bytes(rope: RopeSpec) -> bytes:
    return canonical.length_prefixed(
        rope.kind.encode(), _scalar_bytes(rope.theta), canonical.integer(rope.rotary_dim)
    ) + _named_bytes(rope.parameters)


def _named_bytes(named: Iterable[tuple[str, Scalar]]) -> bytes:
    return canonical.length_prefixed(
        *(part for name, value in named for part in (name.encode(), _scalar_bytes(value)))
    )


def _scalar_bytes(value: Scalar) -> bytes:
    # 8 and 8.0 are one factor, written differently by different configs: every number is an f64.
    if isinstance(value, bool):
        return b"b" + bytes([value])
    if isinstance(value, str):
        return b"s" + value.encode()
    return b"n" + struct.pack("<d", value)


# What the supported families compute with besides their weights, sorted.
_NUMERICS = ("hidden_act", "rms_norm_eps")


def spec_from_config(
    config: Mapping[str, Any], *, weights_digest: bytes, dtype: KVDtype, model_id: str | None = None
) -> ModelSpec:
    """`config` is a Hugging Face config as a dict: transformers 5 (`rope_parameters`) or older
    (`rope_theta`, `rope_scaling`). Without `model_id` the architecture's name is used, never a local path:
    workers that keep the model in different folders must agree, and `weights_digest` tells models apart.

    Raises UnsupportedModelError when the KV cannot be described, with the reason.
    """
    family = config.get("model_type")
    name = model_id or (config.get("architectures") or [family])[0] or "model"
    for key, reason in _FOREIGN_KV.items():
        if config.get(key):
            raise UnsupportedModelError(f"{name}: {reason}")
    if family not in SUPPORTED_FAMILIES:
        raise UnsupportedModelError(
            f"{name}: family {family!r} is not supported; supported are {', '.join(SUPPORTED_FAMILIES)}"
        )
    layers = _positive(config, "num_hidden_layers", name)
    heads = _positive(config, "num_attention_heads", name)
    head_dim = config.get("head_dim") or _positive(config, "hidden_size", name) // heads
    return ModelSpec(
        model_id=name,
        weights_digest=weights_digest,
        layers=layers,
        kv_heads=config.get("num_key_value_heads") or heads,
        head_dim=head_dim,
        dtype=dtype,
        rope=_rope(config, head_dim, name),
        sliding_windows=_sliding_windows(config, layers, name),
        numerics=tuple((key, config[key]) for key in _NUMERICS if config.get(key) is not None),
    )


def _positive(config: Mapping[str, Any], key: str, name: str) -> int:
    value = config.get(key)
    if not isinstance(value, int) or value < 1:
        raise UnsupportedModelError(f"{name}: the config has no usable {key!r} (found {value!r})")
    return value


def _rope(config: Mapping[str, Any], head_dim: int, name: str) -> RopeSpec:
    found: dict[str, Any] = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    kind = found.get("rope_type") or found.get("type") or "default"
    if kind in _LENGTH_DEPENDENT_ROPE_KINDS:
        raise UnsupportedModelError(
            f"{name}: the frequencies of {kind!r} RoPE change with the sequence length, so KV of one request "
            "would be wrong in a longer one"
        )
    if kind not in _FIXED_ROPE_KINDS:
        raise UnsupportedModelError(
            f"{name}: RoPE kind {kind!r} is unknown; known are {', '.join(_FIXED_ROPE_KINDS)}"
        )
    if kind in _ROPE_KINDS_WITH_ORIGINAL_LENGTH:
        longest = config.get("original_max_position_embeddings") or config.get("max_position_embeddings")
        found.setdefault("original_max_position_embeddings", longest)
    parameters: list[tuple[str, Scalar]] = []
    for key, value in sorted(found.items()):
        if key in _NAMED_APART or value is None:
            continue
        if not isinstance(value, float | int | str | bool):
            raise UnsupportedModelError(
                f"{name}: RoPE parameter {key!r} is {value!r}, not a plain number or text"
            )
        parameters.append((key, value))
    theta = found.get("rope_theta") or config.get("rope_theta") or _DEFAULT_ROPE_THETA
    partial = found.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0
    return RopeSpec(kind, float(theta), int(head_dim * partial), tuple(parameters))


def _sliding_windows(config: Mapping[str, Any], layers: int, name: str) -> tuple[int | None, ...]:
    family, window = config["model_type"], config.get("sliding_window")
    # Llama has no windows; Qwen uses its window only when told to; Mistral whenever it has one.
    if family == "llama" or window is None or (family != "mistral" and not config.get("use_sliding_window")):
        return ()
    if family == "mistral":
        return (window,) * layers
    kinds = config.get("layer_types")
    if kinds is None:
        full = config.get("max_window_layers", layers)
        kinds = ["full_attention"] * min(full, layers) + ["sliding_attention"] * max(layers - full, 0)
    if len(kinds) != layers:
        raise UnsupportedModelError(f"{name}: layer_types names {len(kinds)} of {layers} layers")
    windows = tuple(window if kind == "sliding_attention" else None for kind in kinds)
    return windows if any(windows) else ()


def weights_digest(tensors: Iterable[tuple[str, torch.Tensor]]) -> bytes:
    """blake3 over the name, dtype, shape and bytes of every tensor, in the order of the names.

    Takes e.g. `model.state_dict().items()`; tensors may live on any device. At most one tensor at a time is
    copied, and only if it is not contiguous or not in host memory. Hashes on all cores.
    """
    named = sorted(tensors, key=lambda item: item[0])
    hasher = blake3(canonical.length_prefixed(_WEIGHTS_DOMAIN), max_threads=blake3.AUTO)
    for name, tensor in named:
        shape = b"".join(canonical.integer(size) for size in tensor.shape)
        data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        hasher.update(canonical.length_prefixed(name.encode(), str(tensor.dtype).encode(), shape))
        hasher.update(canonical.integer(data.numel()))
        if data.numel():
            hasher.update(data.numpy().data)
    return hasher.digest()
