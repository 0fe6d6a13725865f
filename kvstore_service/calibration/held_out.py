"""Measures how a quantiser step changes a model's predictions, on passages that the calibration was not fitted to."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from kvstore_client.engines.transformers.calibrate import ObservedModel
from kvstore_codec.calibration import Calibration
from kvstore_codec.klt import token_vectors
from kvstore_codec.klt_frames import KLT, Prediction
from kvstore_service.calibration.passages import Passage


@dataclass(frozen=True, slots=True)
class Damage:
    """Effect of a quantiser step."""

    kl: float
    """mean KL divergence from the model's prediction with exact KV, nats per token"""
    errors: tuple[float, ...]
    """mean squared error per value of each period, in the metric"""


@dataclass(frozen=True, slots=True)
class _Coded:
    """One passage: the coefficients of its KV, and the model's prediction with exact KV."""

    continuation: torch.Tensor
    reference: torch.Tensor
    sink_keys: torch.Tensor
    sink_values: torch.Tensor
    prediction: Prediction
    coefficients: tuple[torch.Tensor, ...]


class HeldOut:
    """Held-out passages. Their KV coefficients are computed once, and can be quantised with any step. The first `sinks`
    tokens stay exact."""

    def __init__(
        self,
        observed: ObservedModel,
        calibration: Calibration,
        passages: Sequence[Passage],
        advance: Callable[[], None],
    ) -> None:
        self._observed = observed
        self._sinks = calibration.sinks
        self._klt = KLT(calibration)
        self._passages = []
        for passage in passages:
            self._passages.append(self._code(passage))
            advance()

    def measure(self, step: float) -> Damage:
        """Quantises all passages with `step`, and compares the model's predictions with those after exact KV."""
        kl = 0.0
        squares, counts = torch.zeros(2, len(self._klt.periods), dtype=torch.float64)
        for coded in self._passages:
            keys, restored_values, of_passage = self._restore(coded, step)
            predicted = self._observed.log_probabilities(keys, restored_values, coded.continuation)
            kl += float((coded.reference.exp() * (coded.reference - predicted)).sum(-1).mean())
            squares += torch.tensor(of_passage)
            counts += torch.tensor([coefficients.numel() for coefficients in coded.coefficients])
        return Damage(kl / len(self._passages), tuple((squares / counts).tolist()))

    def expected_step(self, kl: float) -> float:
        """The step that should give a KL divergence of `kl` nats per token. For small errors the metric, a quadratic
        form, approximates the KL divergence of a whole continuation."""
        passage = self._passages[0]
        values = sum(c.numel() for c in passage.coefficients)
        return math.sqrt(12 * 2 * kl * len(passage.continuation) / values)

    def largest_step(self) -> float:
        """A step beyond which every coefficient is quantised to zero."""
        return 4 * max(float(c.abs().max()) for coded in self._passages for c in coded.coefficients)

    def _code(self, passage: Passage) -> _Coded:
        text = self._observed.prefill(passage.context)
        reference = self._observed.log_probabilities(text.keys, text.values, passage.continuation)
        prediction = self._klt.predict(text.features[self._sinks :].cpu())
        keys, values = (part[:, :, self._sinks :].cpu() for part in (text.keys, text.values))
        coefficients, first = [], 0
        for klt, low in zip(self._klt.periods, prediction.low, strict=True):
            layers = slice(first, first + klt.transform.layers)
            first = layers.stop
            coefficients.append(
                klt.analyse(token_vectors(keys[layers], values[layers]), low, klt.transform.columns).values
            )
        sink_keys, sink_values = (part[:, :, : self._sinks].clone() for part in (text.keys, text.values))
        return _Coded(
            passage.continuation,
            reference,
            sink_keys,
            sink_values,
            prediction,
            tuple(coefficients),
        )

    def _restore(self, coded: _Coded, step: float) -> tuple[torch.Tensor, torch.Tensor, list[float]]:
        """Keys and values after quantisation with `step`, and the squared error of each period."""
        layers, heads, _, dim = coded.sink_keys.shape
        shape = (layers, heads, self._sinks + coded.prediction.tokens, dim)
        keys, values = (coded.sink_keys.new_empty(shape) for _ in range(2))
        keys[:, :, : self._sinks], values[:, :, : self._sinks] = coded.sink_keys, coded.sink_values
        squares: list[float] = []
        first = 0
        for klt, low, coefficients in zip(
            self._klt.periods, coded.prediction.low, coded.coefficients, strict=True
        ):
            chosen = slice(first, first + klt.transform.layers)
            first = chosen.stop
            integers = (coefficients / step).round_()
            # The basis is complete and orthonormal, so errors have the same size in its coordinates.
            squares.append(float((coefficients - integers * step).double().square().sum()))
            used = int(integers.any(0).nonzero().max()) + 1 if bool(integers.any()) else 0
            inputs, room = klt.inputs(low, used)
            room.copy_(integers[:, :used] * step)
            klt.restore_(inputs, keys[chosen, :, self._sinks :], values[chosen, :, self._sinks :])
        return keys, values, squares
