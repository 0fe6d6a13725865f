"""Whether two workers' KV of the probe is the same but for rounding."""

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
# instructions. The first layer's KV follows from one norm and one product: it differed by at most 8e-7 (float32) and
# 9.2e-3 (bfloat16: a compiled norm rounds once instead of three times). Behind it rounding adds up over the layers like
# a random walk: at most 1.0e-6 * sqrt(layer) and 2.0e-2 * sqrt(layer). Weights of SmolLM2 rounded to 8 bits differ by
# 3e-2 in the first layer. float16 has 3 bits more than bfloat16.
_FIRST_LAYER = {KVDtype.FLOAT32: 4e-6, KVDtype.FLOAT16: 2.5e-3, KVDtype.BFLOAT16: 1.8e-2}
_LATER_LAYERS = {KVDtype.FLOAT32: 5e-6, KVDtype.FLOAT16: 4e-3, KVDtype.BFLOAT16: 3e-2}
"""Times the square root of the layer's number."""

_SHARE = 0.75
"""Of the tokens that is looked at, those that differ least: what a single token attends to may tip over by rounding
alone (seen in one of 16 tokens of SmolLM2 in bfloat16, compiled and not)."""

_MOST = 0.3
"""However deep: KV that has nothing in common with the canary's differs by about 1.4."""


@dataclass(frozen=True, slots=True)
class ProbeKV:
    """What a model made of the probe, in host memory: keys before RoPE and values of the Sample of its ModelSpec,
    `[layers, kv_heads, tokens, head_dim]` in the model's dtype."""

    keys: torch.Tensor
    values: torch.Tensor

    def to_bytes(self, spec: ModelSpec, probe: Probe) -> bytes:
        """Raises CanaryError for KV of another shape or dtype, and for values that are not finite."""
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
    """What `to_bytes` wrote; the tensors are views of `data`. Raises CanaryError for anything that is not a sketch of
    this model."""
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
    """The layer, and which half of its KV, that differs most in terms of what is tolerated there."""

    difference: float
    """Root mean square of a token's difference, as a share of how much the side that varies less varies over the
    probe's tokens; three quarters of the tokens differ by less."""
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
    """Both are of the same probe and of this model."""
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
    """The greatest `Comparison.difference` that rounding explains in a layer."""
    return _FIRST_LAYER[dtype] if layer == 0 else min(_LATER_LAYERS[dtype] * layer**0.5, _MOST)


def _difference(mine: torch.Tensor, kept: torch.Tensor) -> float:
    """`[kv_heads, tokens, head_dim]` each. What rounding each value once explains is no difference. Infinite where
    either is not finite.

    The scale is that of the side that varies less. So a kept sketch cannot stretch it beyond what this worker computes,
    not even by the few tokens that may differ at will.
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
    """Keys may have means of a hundred times what they vary by: the means are no part of the scale."""
    return kv - kv.mean(1, keepdim=True) if kv.shape[1] > 1 else kv


def _root_mean_square(kv: torch.Tensor) -> float:
    return float(kv.square().mean().sqrt())


def _shape(spec: ModelSpec) -> tuple[int, int, int, int]:
    sample = Sample.of(spec)
    return len(sample.layers), spec.kv_heads, len(sample.tokens), spec.head_dim
