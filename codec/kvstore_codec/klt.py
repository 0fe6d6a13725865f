"""Karhunen-Loève transform of one period: KV <-> integers, by the maps of a calibration.

Both ways are one product of a matrix per period, for as many tokens at once as there are. Restoring multiplies in
bfloat16 where the machine has units for it (Intel AMX, AVX-512 BF16, any GPU), at five times the speed of f32: the
products are summed in f32, so KV comes out as exact as bfloat16 holds it.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from kvstore_codec.calibration import PeriodTransform
from kvstore_codec.errors import CalibrationError

# Rows of the restoring matrix that sum up to the mean.
_MEANS = 2
# Of the energy: factors and result are rounded to bfloat16 wherever a chunk may be decoded, a variance of 2^-16 / 3
# each at most. Matters where one value is thousands of times the others.
_RESTORING_ERROR = 9e-6
# The most that rounding moves an element of the identity that the whitening and its inverse make.
_SINGULAR = 1e-3


def token_vectors(keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """KV of some layers, `[layers, kv_heads, tokens, head_dim]` each, as one vector a token in the order
    [layer, K/V, head, dim]: f32 `[tokens, layers * 2 * kv_heads * head_dim]`."""
    return torch.stack((keys, values), 1).permute(3, 0, 1, 2, 4).flatten(1).float()


@dataclass(frozen=True, slots=True)
class Coefficients:
    """One token a row, in units of the metric."""

    values: torch.Tensor
    """f32 [tokens, columns]"""
    lost: torch.Tensor
    """f32 [tokens], squared error of what these columns of the basis do not express, and of restoring the rest"""


class PeriodKLT:
    """The maps of a PeriodTransform, multiplied out for encoding and decoding. Thread-safe, immutable.

    Raises CalibrationError for a whitening that is singular."""

    def __init__(self, transform: PeriodTransform) -> None:
        self.transform = transform
        whitening = transform.whitening
        layers, pair, heads, dim, _ = whitening.shape
        self._shape = (layers, pair, heads, dim)
        blocks = transform.basis.reshape(*self._shape, -1)
        try:
            inverse = torch.linalg.inv(whitening.double())
        except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]  # exported without being said
            raise CalibrationError("a calibration's whitening is singular") from error
        off = float(
            (whitening.double() @ inverse - torch.eye(dim, dtype=torch.float32, device="cpu")).abs().max()
        )
        if not off < _SINGULAR or not bool(inverse.float().isfinite().all()):
            raise CalibrationError("a calibration's whitening is singular")
        # x = whitening^-1 basis q: [columns, D]
        synthesis = (inverse @ blocks.double()).float().reshape(transform.values, -1).T
        dtype = compute_dtype()
        coarse = transform.mean.to(dtype).float()
        mean = torch.stack((coarse, transform.mean - coarse))  # two terms hold what one of bfloat16 cannot
        # Coefficients stand last, so that some at the end may be left out.
        self._restoring = torch.cat((mean, transform.predictor_out, synthesis)).to(dtype)
        self._mean = transform.mean.view(layers, pair, heads, 1, dim)
        self._maps: dict[torch.device, tuple[torch.Tensor, torch.Tensor]] = {}

    @property
    def rank(self) -> int:
        """Of the prediction."""
        return self.transform.predictor_in.shape[1]

    def analyse(self, rows: torch.Tensor, low: torch.Tensor, columns: int) -> Coefficients:
        """Coefficients of the first `columns` columns of the basis. `rows` are `token_vectors`, and `low`
        [tokens, rank] of the Prediction."""
        predicted = low.float() @ self._restoring[_MEANS : _MEANS + self.rank].float()
        residual = (rows - self.transform.mean - predicted).view(-1, *self._shape)
        white = torch.einsum("tlchi,lchij->tlchj", residual, self.transform.whitening).flatten(1)
        found = white @ self.transform.basis[:, :columns]
        energy = found.square().sum(1)
        lost = _RESTORING_ERROR * energy
        if columns < self.transform.values:  # otherwise all is expressed
            lost += (white.square().sum(1) - energy).clamp_(min=0)
        return Coefficients(found, lost)

    def columns_above(self, deviation: float) -> int:
        """Columns whose coefficients deviate by more than that on the calibration's text: the first ones."""
        return int((self.transform.variances > deviation**2).sum())

    def inputs(self, low: torch.Tensor, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
        """What `restore_` takes, [tokens, all], in host memory, and the part of it that is to be filled in: integers
        times step, [tokens, columns], zeros so far. `low` [tokens, rank] is of the Prediction."""
        known = _MEANS + self.rank
        inputs = torch.zeros((len(low), known + columns), dtype=compute_dtype(), device="cpu")
        inputs[:, :_MEANS] = 1
        inputs[:, _MEANS:known] = low
        return inputs, inputs[:, known:]

    def restore_(self, inputs: torch.Tensor, out_keys: torch.Tensor, out_values: torch.Tensor) -> None:
        """Into [layers, heads, tokens, dim] tensors of any dtype and strides, on the device of `inputs`; columns at the
        end of those may be left out."""
        self.place_(self.product(inputs, out_keys.dtype), out_keys, out_values)

    def product(self, inputs: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """What `place_` takes, [tokens, values], for KV of that dtype. Many tokens at once cost less each: the matrix
        is rearranged for every product."""
        restoring, _ = self._maps_on(inputs.device)
        restoring = restoring[: inputs.shape[1]]
        if dtype != restoring.dtype:
            return inputs[:, _MEANS:] @ restoring[_MEANS:]
        return inputs @ restoring

    def place_(self, rows: torch.Tensor, out_keys: torch.Tensor, out_values: torch.Tensor) -> None:
        """Some rows of a `product` into [layers, heads, tokens, dim] tensors of the dtype that it was made for."""
        _, mean = self._maps_on(rows.device)
        both = rows.view(-1, *self._shape).permute(1, 2, 3, 0, 4)
        for out, index in ((out_keys, 0), (out_values, 1)):
            out.copy_(both[:, index])
            if out.dtype != rows.dtype:  # a product in bfloat16 would have rounded the mean as well
                out.add_(mean[:, index])

    def _maps_on(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        if device not in self._maps:
            self._maps[device] = self._restoring.to(device), self._mean.to(device)
        return self._maps[device]


@functools.cache
def compute_dtype() -> torch.dtype:
    """What matrices are multiplied in on this machine when KV is restored."""
    fast = (
        torch.cuda.is_available()
        or torch.cpu._is_amx_tile_supported()
        or torch.cpu._is_avx512_bf16_supported()
    )
    return torch.bfloat16 if fast else torch.float32
