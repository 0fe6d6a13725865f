"""Karhunen-Loève transform of one period: KV <-> integers, by the maps of a calibration."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kvstore_codec.calibration import PeriodTransform


@dataclass(frozen=True, slots=True)
class Coefficients:
    """One token a row, in units of the metric."""

    values: torch.Tensor
    """f32 [tokens, columns]"""
    white: torch.Tensor
    """f32 [tokens, D], what they are the coefficients of"""


class PeriodKLT:
    """The maps of a PeriodTransform, multiplied out for encoding and decoding. Thread-safe, immutable."""

    def __init__(self, transform: PeriodTransform) -> None:
        self.transform = transform
        whitening = transform.whitening
        layers, pair, heads, dim, _ = whitening.shape
        self._shape = (layers, pair, heads, dim)
        blocks = transform.basis.reshape(*self._shape, -1)
        inverse = torch.linalg.inv(whitening.double())
        # x = whitening^-1 basis q: [columns, D]
        self.synthesis = (inverse @ blocks.double()).float().reshape(transform.values, -1).T.contiguous()

    def gather(self, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """[layers, heads, tokens, dim] twice -> f32 [tokens, D]."""
        both = torch.stack((keys, values), dim=1)
        return both.permute(3, 0, 1, 2, 4).reshape(both.shape[3], -1).float()

    def scatter_(self, rows: torch.Tensor, out_keys: torch.Tensor, out_values: torch.Tensor) -> None:
        """The inverse of `gather`, into tensors of any dtype and strides."""
        both = rows.view(-1, *self._shape).permute(1, 2, 3, 0, 4)
        out_keys.copy_(both[:, 0])
        out_values.copy_(both[:, 1])

    def predict(self, features: torch.Tensor) -> torch.Tensor:
        """What is known of a token before a byte of it has come: f32 [tokens, D]."""
        transform = self.transform
        if not transform.predictor_in.shape[1]:
            return transform.mean.expand(len(features), -1)
        return torch.addmm(transform.mean, features @ transform.predictor_in, transform.predictor_out)

    def analyse(self, rows: torch.Tensor, features: torch.Tensor) -> Coefficients:
        residual = (rows - self.predict(features)).view(-1, *self._shape)
        white = torch.einsum("tlchi,lchij->tlchj", residual, self.transform.whitening).flatten(1)
        return Coefficients(white @ self.transform.basis, white)

    def error(self, found: Coefficients, coefficients: torch.Tensor) -> float:
        """Squared error in the metric, over all tokens, if these coefficients stand for what was found."""
        return float((found.white - coefficients @ self.transform.basis.T).square().sum())

    def synthesise(self, integers: torch.Tensor, features: torch.Tensor, step: float) -> torch.Tensor:
        """`integers` is f32 [tokens, columns], of which the last may be left out. Returns f32 [tokens, D]."""
        return self.predict(features).addmm(integers, self.synthesis[: integers.shape[1]], alpha=step)
