"""Computes the maps of a calibration from moments alone.

Prediction is reduced-rank regression (Izenman 1975): ridge regression of the whitened values on the features,
projected on the directions in which it explains most variance. The basis is the KLT of the residual.
"""

import torch

from kvstore_codec.calibrate.moments import Moments
from kvstore_codec.calibration import PeriodTransform
from kvstore_codec.errors import CalibrationError

_RIDGE = 1e-3
"""Ridge penalty of the predictor, as a fraction of the features' mean variance."""


def fit_periods(moments: Moments, whitening: torch.Tensor, rank: int) -> tuple[PeriodTransform, ...]:
    """Fits one transform per period, with a complete basis.

    `whitening` is `[layers, 2, kv_heads, head_dim, head_dim]`, the square root of the metric. The rank of a period is
    at most its number of features and values. With rank 0 the prediction is the mean.

    Raises CalibrationError if the moments have fewer than two tokens or another shape than the whitening.
    """
    if rank < 0:
        raise CalibrationError(f"the predictor's rank is {rank}; it must be 0 or more")
    shape = (moments.layers, 2, moments.kv_heads, moments.head_dim, moments.head_dim)
    if whitening.shape != shape:
        raise CalibrationError(f"a whitening of {list(whitening.shape)} does not fit {list(shape)}")
    if moments.tokens < 2:
        raise CalibrationError(f"{moments.tokens} tokens are too few to calibrate on")
    feature_mean, feature_covariance = moments.feature_moments()
    penalty = _RIDGE * feature_covariance.diagonal().mean().clamp_min(torch.finfo(torch.float64).tiny)
    factor = torch.linalg.cholesky(
        feature_covariance + penalty * torch.eye(len(feature_mean), dtype=torch.float64, device="cpu")
    )
    fitted = []
    first = 0
    for period in range(moments.periods):
        chosen = slice(first, first + moments.period_layers(period))
        first = chosen.stop
        fitted.append(
            _fit(
                moments.period_moments(period),
                feature_mean,
                feature_covariance,
                factor,
                whitening[chosen].double(),
                rank,
            )
        )
    return tuple(fitted)


def _fit(
    of_period: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    feature_mean: torch.Tensor,
    feature_covariance: torch.Tensor,
    factor: torch.Tensor,
    whitening: torch.Tensor,
    rank: int,
) -> PeriodTransform:
    mean, covariance, cross = of_period
    blocks = whitening.flatten(0, 2)
    covariance = _blockwise(_blockwise(covariance, blocks).T, blocks)
    cross = _blockwise(cross, blocks)

    weights, directions, deviations = _predictor(cross, feature_covariance, factor, rank)
    # Each prediction is scaled to a variance of one, so that both matrices suit half precision, in which a
    # PeriodTransform keeps them. Mean and basis are computed from the rounded matrices.
    predictor_in = (weights / deviations).half().double()
    in_values = (_blockwise(directions.T, torch.linalg.inv(blocks)) * deviations[:, None]).half().double()
    predictor_out = _blockwise(in_values, blocks)
    explained = cross.T @ predictor_in @ predictor_out
    predicted = predictor_out.T @ (predictor_in.T @ feature_covariance @ predictor_in) @ predictor_out
    residual = covariance - explained - explained.T + predicted

    variances, basis = torch.linalg.eigh((residual + residual.T) / 2)
    return PeriodTransform(
        mean=(mean - feature_mean @ predictor_in @ in_values).float(),
        predictor_in=predictor_in.float(),
        predictor_out=in_values.float(),
        whitening=whitening.float(),
        basis=basis.flip(1).float(),
        variances=variances.flip(0).clamp_min(0).float(),
    )


def _predictor(
    cross: torch.Tensor, feature_covariance: torch.Tensor, factor: torch.Tensor, rank: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Weights `[features, r]`, whitened directions `[D, r]` and standard deviations `[r]` of at most `rank`
    predictions. Predictions without variance are left out."""
    regression = torch.cholesky_solve(cross, factor)
    spread = regression.T @ feature_covariance @ regression
    variances, directions = torch.linalg.eigh((spread + spread.T) / 2)
    varying = int((variances > 1e-12 * variances[-1].clamp_min(1e-300)).sum())
    chosen = min(rank, varying, len(factor))
    directions = directions.flip(1)[:, :chosen]
    return regression @ directions, directions, variances.flip(0)[:chosen].sqrt()


def _blockwise(matrix: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
    """`matrix` `[rows, n * k]` times the block-diagonal matrix of the symmetric `blocks` `[n, k, k]`."""
    count, size, _ = blocks.shape
    grouped = matrix.reshape(len(matrix), count, size).transpose(0, 1)
    return torch.bmm(grouped, blocks).transpose(0, 1).reshape(matrix.shape)
