"""Karhunen-Loève transform (KLT) of one period: converts KV to coefficients and back with a calibration's maps.

Each direction is one matrix product per period, for any number of tokens at once. Restoring multiplies in bfloat16 if
the machine has units for it (Intel AMX, AVX-512 BF16, any GPU), at five times the speed of f32. The products are summed
in f32, so the KV is as exact as bfloat16 can represent it.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from kvstore_codec.calibration import PeriodTransform
from kvstore_codec.errors import CalibrationError

# Number of rows of the restoring matrix whose sum is the mean.
_MEANS = 2
# Error of restoring in bfloat16, as a fraction of the energy. A decoder may round factors and result to bfloat16, with
# a variance of at most 2^-16 / 3 each. It matters if one value is thousands of times as large as the others.
_RESTORING_ERROR = 9e-6
# Largest deviation from the identity of the whitening times its inverse. Beyond it the whitening is singular.
_SINGULAR = 1e-3


def token_vectors(keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """One vector per token from `keys` and `values`, `[layers, kv_heads, tokens, head_dim]` each. The result is f32
    `[tokens, layers * 2 * kv_heads * head_dim]`, in the order [layer, K/V, head, dim]."""
    return torch.stack((keys, values), 1).permute(3, 0, 1, 2, 4).flatten(1).float()


@dataclass(frozen=True, slots=True)
class Coefficients:
    """KLT coefficients, one row per token, in units of the metric."""

    values: torch.Tensor
    """f32 [tokens, columns]"""
    lost: torch.Tensor
    """f32 [tokens], squared error outside these columns of the basis, plus the error of restoring in bfloat16"""


class PeriodKLT:
    """The matrices of a PeriodTransform, multiplied out for encoding and decoding. Thread-safe and immutable.

    Raises CalibrationError for a singular whitening."""

    def __init__(self, transform: PeriodTransform) -> None:
        self.transform = transform
        whitening = transform.whitening
        layers, pair, heads, dim, _ = whitening.shape
        self._shape = (layers, pair, heads, dim)
        blocks = transform.basis.reshape(*self._shape, -1)
        try:
            inverse = torch.linalg.inv(whitening.double())
        except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]  # exported without a declaration
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
        mean = torch.stack(
            (coarse, transform.mean - coarse)
        )  # the mean as two bfloat16 terms, because one is not exact enough
        # Coefficients come last, so that trailing ones may be left out.
        self._restoring = torch.cat((mean, transform.predictor_out, synthesis)).to(dtype)
        self._mean = transform.mean.view(layers, pair, heads, 1, dim)
        self._maps: dict[torch.device, tuple[torch.Tensor, torch.Tensor]] = {}

    @property
    def rank(self) -> int:
        """Rank of the prediction."""
        return self.transform.predictor_in.shape[1]

    def analyse(self, rows: torch.Tensor, low: torch.Tensor, columns: int) -> Coefficients:
        """Coefficients of the first `columns` columns of the basis. `rows` are `token_vectors`; `low`, [tokens, rank],
        is the Prediction of these tokens."""
        predicted = low.float() @ self._restoring[_MEANS : _MEANS + self.rank].float()
        residual = (rows - self.transform.mean - predicted).view(-1, *self._shape)
        white = torch.einsum("tlchi,lchij->tlchj", residual, self.transform.whitening).flatten(1)
        found = white @ self.transform.basis[:, :columns]
        energy = found.square().sum(1)
        lost = _RESTORING_ERROR * energy
        if columns < self.transform.values:  # the full basis has no error outside it
            lost += (white.square().sum(1) - energy).clamp_(min=0)
        return Coefficients(found, lost)

    def columns_above(self, deviation: float) -> int:
        """Number of leading columns whose standard deviation on the calibration's text exceeds `deviation`."""
        return int((self.transform.variances > deviation**2).sum())

    def inputs(self, low: torch.Tensor, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Allocates the input of `restore_`, in host memory. Returns it and its view [tokens, columns] for the
        coefficients (integers times step), which is zero. `low`, [tokens, rank], is the Prediction of these tokens."""
        known = _MEANS + self.rank
        inputs = torch.zeros((len(low), known + columns), dtype=compute_dtype(), device="cpu")
        inputs[:, :_MEANS] = 1
        inputs[:, _MEANS:known] = low
        return inputs, inputs[:, known:]

    def restore_(self, inputs: torch.Tensor, out_keys: torch.Tensor, out_values: torch.Tensor) -> None:
        """Restores KV to [layers, heads, tokens, dim] tensors of any dtype and strides, on the device of `inputs`.
        `inputs` may lack trailing columns."""
        self.place_(self.product(inputs, out_keys.dtype), out_keys, out_values)

    def product(self, inputs: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The input of `place_`, [tokens, values], for KV of `dtype`. The matrix is rearranged for every product, so
        many tokens at once cost less per token."""
        restoring, _ = self._maps_on(inputs.device)
        restoring = restoring[: inputs.shape[1]]
        if dtype != restoring.dtype:
            return inputs[:, _MEANS:] @ restoring[_MEANS:]
        return inputs @ restoring

    def place_(self, rows: torch.Tensor, out_keys: torch.Tensor, out_values: torch.Tensor) -> None:
        """Copies rows of a `product` to [layers, heads, tokens, dim] tensors of the dtype it was made for."""
        _, mean = self._maps_on(rows.device)
        both = rows.view(-1, *self._shape).permute(1, 2, 3, 0, 4)
        for out, index in ((out_keys, 0), (out_values, 1)):
            out.copy_(both[:, index])
            if out.dtype != rows.dtype:  # the product left out the mean, which bfloat16 would round
                out.add_(mean[:, index])

    def _maps_on(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        if device not in self._maps:
            self._maps[device] = self._restoring.to(device), self._mean.to(device)
        return self._maps[device]


@functools.cache
def compute_dtype() -> torch.dtype:
    """Dtype of the matrix products that restore KV on this machine."""
    fast = (
        torch.cuda.is_available()
        or torch.cpu._is_amx_tile_supported()
        or torch.cpu._is_avx512_bf16_supported()
    )
    return torch.bfloat16 if fast else torch.float32
