"""Comparison of two workers' KV of the probe: equal except for rounding, or different."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch

from kvstore_codec.canary.probe import Probe, Sample
from kvstore_codec.canary.sketch import SketchHeader, read_sketch, write_sketch
from kvstore_codec.errors import CanaryError
from kvstore_codec.model_spec import KVDtype, ModelSpec

# Measured on a processor with AVX2, SmolLM2-135M and random Llama, Qwen3 and Gemma 3 models, between eager and fused
# attention, torch.compile, matrix products in other precisions and orders, 1 and 2 threads, with and without vector
# instructions. The first layer's KV is one norm and one product: it differed by at most 8e-7 (float32) and
# 9.2e-3 (bfloat16: a compiled norm rounds once instead of three times). In later layers rounding accumulates like
# a random walk: at most 1.0e-6 * sqrt(layer) and 2.0e-2 * sqrt(layer). Weights of SmolLM2 rounded to 8 bits differ by
# 3e-2 in the first layer. float16 has 3 bits more than bfloat16.
_FIRST_LAYER = {KVDtype.FLOAT32: 4e-6, KVDtype.FLOAT16: 2.5e-3, KVDtype.BFLOAT16: 1.8e-2}
_LATER_LAYERS = {KVDtype.FLOAT32: 5e-6, KVDtype.FLOAT16: 4e-3, KVDtype.BFLOAT16: 3e-2}
"""Tolerance of a later layer, divided by the square root of its number."""

_SHARE = 0.75
"""Quantile over tokens that is compared. Rounding alone can change what a single token attends to (measured in one of
16 tokens of SmolLM2 in bfloat16, compiled against not compiled), so the tokens that differ most are ignored."""

_MOST = 0.3
"""Largest tolerance at any depth. Unrelated KV differs by about 1.4."""


@dataclass(frozen=True, slots=True)
class ProbeKV:
    """A model's KV of the probe, in host memory: keys before RoPE and values of the Sample of its ModelSpec,
    `[layers, kv_heads, tokens, head_dim]` in the model's dtype."""

    keys: torch.Tensor
    values: torch.Tensor

    def to_bytes(self, spec: ModelSpec, probe: Probe) -> bytes:
        """Serialises the KV. Raises CanaryError for another shape or dtype, and for values that are not finite."""
        shape = _shape(spec)
        for part in (self.keys, self.values):
            if tuple(part.shape) != shape or part.dtype != spec.dtype.torch:
                raise CanaryError(f"KV of {list(part.shape)} {part.dtype} is not a sample of {spec.model_id}")
            if not bool(part.isfinite().all()):
                raise CanaryError(f"{spec.model_id} computes NaN or infinity for the probe")
        header = SketchHeader(spec.digest, probe, spec.dtype, shape)
        body = b"".join(
            part.contiguous().view(torch.uint8).numpy().tobytes() for part in (self.keys, self.values)
        )
        return write_sketch(header, body)


def read_probe_kv(data: bytes, spec: ModelSpec) -> tuple[Probe, ProbeKV]:
    """Inverse of `to_bytes`. Raises CanaryError for bytes that are not a sketch of this model."""
    header, body = read_sketch(data)
    wanted = spec.digest, spec.dtype, _shape(spec)
    if (header.model_digest, header.dtype, header.shape) != wanted:
        raise CanaryError(
            f"the canary is of model {header.model_digest.hex()[:12]}, {list(header.shape)} {header.dtype}, and not "
            f"of {spec.digest.hex()[:12]}, {list(wanted[2])} {spec.dtype}"
        )
    both = torch.frombuffer(bytearray(body), dtype=spec.dtype.torch).view(2, *header.shape)
    return header.probe, ProbeKV(both[0], both[1])


@dataclass(frozen=True, slots=True)
class Comparison:
    """Result of a comparison: the layer, and its keys or values, with the largest difference relative to tolerance."""

    difference: float
    """Upper quartile over tokens of the root mean square difference of a token, divided by the standard deviation over
    the probe's tokens of the side that varies less."""
    tolerance: float
    layer: int
    kind: Literal["keys", "values"]

    @property
    def agrees(self) -> bool:
        return self.difference <= self.tolerance

    def __str__(self) -> str:
        return (
            f"{self.kind} of layer {self.layer} differ by {self.difference:.2g} of how much they vary, "
            f"where rounding makes at most {self.tolerance:.2g}"
        )


def compare(own: ProbeKV, kept: ProbeKV, spec: ModelSpec) -> Comparison:
    """Compares two workers' KV of one probe and one model, layer by layer."""
    worst: Comparison | None = None
    halves: tuple[tuple[Literal["keys", "values"], torch.Tensor, torch.Tensor], ...] = (
        ("keys", own.keys, kept.keys),
        ("values", own.values, kept.values),
    )
    for kind, mine, others in halves:
        for number, layer in enumerate(Sample.of(spec).layers):
            difference = _difference(mine[number], others[number])
            found = Comparison(difference, tolerance(spec.dtype, layer), layer, kind)
            if worst is None or found.difference / found.tolerance > worst.difference / worst.tolerance:
                worst = found
    if worst is None:
        raise CanaryError(f"{spec.model_id} has no layers to compare")
    return worst


def tolerance(dtype: KVDtype, layer: int) -> float:
    """The largest `Comparison.difference` of a layer that rounding can cause."""
    return _FIRST_LAYER[dtype] if layer == 0 else min(_LATER_LAYERS[dtype] * layer**0.5, _MOST)


def _difference(mine: torch.Tensor, kept: torch.Tensor) -> float:
    """Difference of one layer's keys or values, `[kv_heads, tokens, head_dim]` each. The part that one rounding of each
    value explains is subtracted. Infinite if either side is not finite.

    The scale is the standard deviation of the side that varies less. So a stored sketch cannot raise the scale beyond
    that of this worker's KV, not even with the tokens above the quantile, which may differ by any amount.
    """
    rounding = torch.finfo(kept.dtype).eps / 2
    mine, kept = mine.double(), kept.double()
    rounded = rounding * min(_root_mean_square(mine), _root_mean_square(kept))
    varies = min(_root_mean_square(_centred(mine)), _root_mean_square(_centred(kept)))
    tokens = ((mine - kept).square().mean((0, 2)).sqrt() - rounded).clamp_min(0) / max(varies, 1e-30)
    if not bool(tokens.isfinite().all()):
        return math.inf
    return float(tokens.quantile(_SHARE))


def _centred(kv: torch.Tensor) -> torch.Tensor:
    """`kv` without its mean over tokens. Keys may have means of a hundred standard deviations."""
    return kv - kv.mean(1, keepdim=True) if kv.shape[1] > 1 else kv


def _root_mean_square(kv: torch.Tensor) -> float:
    return float(kv.square().mean().sqrt())


def _shape(spec: ModelSpec) -> tuple[int, int, int, int]:
    sample = Sample.of(spec)
    return len(sample.layers), spec.kv_heads, len(sample.tokens), spec.head_dim
