"""Calibration of a model: linear maps, fitted once to sample text, between KV and a few independent coefficients.

For one token and one period of layers, K before RoPE and V are one vector x of D = layers * 2 * kv_heads * head_dim
values, in the order [layer, K/V, head, dim]. A calibration models it as

    x ~ mean + (features @ predictor_in) @ predictor_out + whitening^-1 (basis @ (integers * step))

`features` are the input embeddings of the token and of the token before it, which the receiver already has.
`whitening` is the square root of the metric that weighs errors by their effect on the model, so that one step for all
coefficients is the rate-distortion optimum. `basis` (KLT, Karhunen-Loève) makes the residual uncorrelated.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import safetensors.torch
import torch
from blake3 import blake3
from safetensors import SafetensorError

from kvstore_codec import bounded
from kvstore_codec.canonical import require_digest
from kvstore_codec.errors import CalibrationError, CodecError
from kvstore_codec.geometry import MAX_LAYERS
from kvstore_codec.model_spec import ModelSpec

MAX_CALIBRATION_BYTES = 1 << 30
VERSION = 2
# Far above those of a calibration with a period for each of MAX_LAYERS layers.
_MAX_HEADER_BYTES = 4 << 20
_MOST_HEADER_VALUES = 1 << 17
# Largest deviation of the basis from orthonormality, as a change of a vector's length.
_NOT_ORTHONORMAL = 0.01
# Half precision is far more exact than the integers. Means and metric stay in f32, because keys with a bias may be a
# hundred standard deviations from zero.
_HALF = ("predictor_in", "predictor_out", "basis")
_FULL = ("mean", "whitening", "variances")


@dataclass(frozen=True, slots=True)
class PeriodTransform:
    """The maps of one period. All tensors are f32 in host memory; some are rounded to half precision.

    Raises CalibrationError if their shapes do not match."""

    mean: torch.Tensor
    """[D], the prediction for features of zero"""
    predictor_in: torch.Tensor
    """[features, rank]; with rank 0 the prediction is the mean"""
    predictor_out: torch.Tensor
    """[rank, D]"""
    whitening: torch.Tensor
    """[layers, 2, kv_heads, head_dim, head_dim], symmetric and positive definite"""
    basis: torch.Tensor
    """[D, columns], orthonormal, in order of falling variance"""
    variances: torch.Tensor
    """[columns], variances of the coefficients on the calibration's text"""

    def __post_init__(self) -> None:
        for name in _HALF:  # the fitted matrices must equal those read from a file
            object.__setattr__(self, name, getattr(self, name).half().float())
        if self.whitening.ndim != 5:
            raise CalibrationError("the whitening must be [layers, 2, kv_heads, head_dim, head_dim]")
        layers, pair, heads, dim, _ = self.whitening.shape
        values = layers * 2 * heads * dim
        rank, columns = self.predictor_in.shape[-1], self.basis.shape[-1]
        expected = {
            "mean": (values,),
            "predictor_in": (self.features, rank),
            "predictor_out": (rank, values),
            "whitening": (layers, 2, heads, dim, dim),
            "basis": (values, columns),
            "variances": (columns,),
        }
        for name, shape in expected.items():
            tensor = getattr(self, name)
            if tuple(tensor.shape) != shape or tensor.dtype != torch.float32:
                raise CalibrationError(
                    f"a calibration's {name} is {tensor.dtype} {list(tensor.shape)}, not f32 {list(shape)}"
                )
            if not bool(tensor.isfinite().all()):
                raise CalibrationError(f"a calibration's {name} holds NaN or infinity")
        if pair != 2 or not 1 <= columns <= values:
            raise CalibrationError(f"a basis of {columns} columns does not fit {values} values")
        probe = (
            torch.ones(columns, 1, dtype=torch.float32, device="cpu").cumsum(0).cos()
        )  # an arbitrary vector
        lengthened = float((self.basis @ probe).norm() / probe.norm())
        if not abs(lengthened - 1) < _NOT_ORTHONORMAL:
            raise CalibrationError(f"a calibration's basis is not orthonormal: it scales by {lengthened:.3g}")

    @property
    def layers(self) -> int:
        return self.whitening.shape[0]

    @property
    def values(self) -> int:
        """D: number of values of one token in this period, K and V together."""
        return self.basis.shape[0]

    @property
    def columns(self) -> int:
        return self.basis.shape[1]

    @property
    def features(self) -> int:
        return self.predictor_in.shape[0]


@dataclass(frozen=True)
class Calibration:
    """Calibration of one model, which its calibrated chunks name. Raises CalibrationError if its parts do not match."""

    model_digest: bytes
    period_layers: int
    sinks: int
    """Number of first tokens of a text that every rate keeps exact, because all later tokens attend to them."""
    steps: Mapping[str, float]
    """rate -> quantiser step, in units of the metric"""
    errors: Mapping[str, tuple[float, ...]]
    """rate -> mean squared error per value, in the metric, per period, on the calibration's text"""
    periods: tuple[PeriodTransform, ...]
    provenance: Mapping[str, Any] = field(default_factory=dict)
    """Texts, tokens and measured KL, as JSON, for information only."""

    def __post_init__(self) -> None:
        require_digest("the model digest", self.model_digest)
        if type(self.period_layers) is not int or type(self.sinks) is not int:
            raise CalibrationError("a calibration's period_layers and sinks must be integers")
        if not isinstance(self.provenance, Mapping):
            raise CalibrationError("a calibration's provenance must be a mapping")
        if not 1 <= self.period_layers <= MAX_LAYERS or not 0 <= self.sinks <= 64 or not self.periods:
            raise CalibrationError("a calibration needs periods of at least one layer, and 0 to 64 sinks")
        if self.steps.keys() != self.errors.keys():
            raise CalibrationError("a calibration needs a step and errors for the same rates")
        for name, step in self.steps.items():
            numbers = (step, *self.errors[name])
            if len(numbers) != 1 + len(self.periods) or not all(math.isfinite(n) and n > 0 for n in numbers):
                raise CalibrationError(f"a calibration with a step and errors of {numbers} for {name!r}")
        if any(period.layers != self.period_layers for period in self.periods[:-1]):
            raise CalibrationError(f"a calibration with a period of other than {self.period_layers} layers")
        shapes = {(period.whitening.shape[2:], period.features) for period in self.periods}
        if len(shapes) != 1 or not 1 <= self.periods[-1].layers <= self.period_layers:
            raise CalibrationError("the periods of a calibration have the shapes of different models")

    @property
    def features(self) -> int:
        """Number of features of a token; see `token_features`."""
        return self.periods[0].features

    @cached_property
    def digest(self) -> bytes:
        """blake3 of `to_bytes`. It names the calibration in every chunk that was coded with it."""
        return blake3(self.to_bytes()).digest()

    def require(self, spec: ModelSpec) -> None:
        """Raises CalibrationError unless this is a calibration of the model `spec`."""
        if self.model_digest != spec.digest:
            raise CalibrationError(
                f"the calibration was made for model {self.model_digest.hex()[:16]}, not for {spec.model_id} "
                f"({spec.digest.hex()[:16]}); make one with `kvstore calibrate`"
            )
        layers = sum(period.layers for period in self.periods)
        if (layers, *self.periods[0].whitening.shape[2:4]) != (spec.layers, spec.kv_heads, spec.head_dim):
            raise CalibrationError(f"the calibration's shapes differ from those of {spec.model_id}")

    def to_bytes(self) -> bytes:
        """Serialises the calibration as a safetensors file."""
        tensors: dict[str, torch.Tensor] = {}
        for index, period in enumerate(self.periods):
            for name in _FULL + _HALF:
                tensor = getattr(period, name)
                tensors[f"{index}.{name}"] = (tensor.half() if name in _HALF else tensor).contiguous()
        facts = {
            "version": VERSION,
            "model": self.model_digest.hex(),
            "period_layers": self.period_layers,
            "sinks": self.sinks,
            "steps": dict(self.steps),
            "errors": {rate: list(errors) for rate, errors in self.errors.items()},
            "periods": len(self.periods),
            "provenance": dict(self.provenance),
        }
        # One entry only: the order of several would change from run to run.
        return safetensors.torch.save(tensors, {"kvstore": json.dumps(facts, sort_keys=True)})

    @classmethod
    def from_bytes(cls, data: bytes) -> Calibration:
        """Inverse of `to_bytes`, up to its rounding. Raises CalibrationError for bytes that are not a calibration.
        Memory stays within a few times the size of `data`."""
        if len(data) > MAX_CALIBRATION_BYTES:
            raise CalibrationError(
                f"a calibration of {len(data)} bytes is absurd: at most {MAX_CALIBRATION_BYTES}"
            )
        try:
            facts = bounded.loads(_header(data)["__metadata__"]["kvstore"], _MOST_HEADER_VALUES)
            _require_version(facts["version"])
            tensors = safetensors.torch.load(data)
            periods = [
                PeriodTransform(**{name: _tensor(tensors, index, name) for name in _FULL + _HALF})
                for index in range(facts["periods"])
            ]
            calibration = cls(
                bytes.fromhex(facts["model"]),
                facts["period_layers"],
                facts["sinks"],
                facts["steps"],
                {rate: tuple(errors) for rate, errors in facts["errors"].items()},
                tuple(periods),
                facts["provenance"],
            )
        except CalibrationError:
            raise
        except (
            CodecError,
            SafetensorError,
            ValueError,
            KeyError,
            TypeError,
            IndexError,
            AttributeError,
            RecursionError,
            OverflowError,
        ) as error:
            raise CalibrationError(f"these bytes are not a calibration: {str(error)[:200]!r}") from error
        # The digest is that of these bytes: another version of safetensors may serialise the same content differently.
        calibration.__dict__["digest"] = blake3(data).digest()
        return calibration


def _header(data: bytes) -> Any:
    """Parses the header of a safetensors file. Raises ValueError."""
    size_bytes = int.from_bytes(data[:8], "little")
    if size_bytes > _MAX_HEADER_BYTES:
        raise ValueError(f"its header has {size_bytes} bytes; at most {_MAX_HEADER_BYTES}")
    return bounded.loads(data[8 : 8 + size_bytes].decode(), _MOST_HEADER_VALUES)


def _tensor(tensors: Mapping[str, torch.Tensor], period: int, name: str) -> torch.Tensor:
    tensor, dtype = tensors[f"{period}.{name}"], torch.float16 if name in _HALF else torch.float32
    if tensor.dtype != dtype:
        raise CalibrationError(f"a calibration's {name} is {tensor.dtype}, not {dtype}")
    return tensor.float()


def _require_version(version: object) -> None:
    if version != VERSION:
        raise CalibrationError(f"the calibration has version {version!r}, this codec reads version {VERSION}")


def token_features(embeddings: torch.Tensor, previous: torch.Tensor | None = None) -> torch.Tensor:
    """The input of the prediction, f32 [tokens, 2 * hidden]: the input embeddings of each token and of the token before
    it, each divided by its rms, like the norm before a layer's projections.

    `embeddings` is [tokens, hidden]. `previous`, [hidden], is the embedding of the token before the first one, or None
    at the beginning of a text. A chunk is encoded as if it began a text, so its features depend only on its own
    tokens, and it can be reused after any other text.
    """
    rows = embeddings.detach().float()
    before = torch.zeros_like(rows[:1]) if previous is None else previous.detach().float().reshape(1, -1)
    scaled = torch.nn.functional.rms_norm(torch.cat((before, rows)), (rows.shape[-1],), eps=1e-5)
    return torch.cat((scaled[1:], scaled[:-1]), dim=1)
