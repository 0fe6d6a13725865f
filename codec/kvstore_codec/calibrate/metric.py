"""Error metric: how much errors in KV affect a model.

An error e in a key changes the logit of a query q by q^T e, so its weight is E[q q^T], after RoPE. An error in a value
passes through the output projection W_o. The weight of a whole layer's keys or values is one scalar, the Fisher
information tr E[g g^T] / dim, where g is the gradient of the log-likelihood of labels drawn from the model itself
(Amari, "Natural Gradient Works Efficiently in Learning", 1998). The KL divergence is its quadratic form.
"""

import torch

from kvstore_codec.errors import CalibrationError

# The key metric is averaged over log-spaced distances between a query and a key.
_LONGEST_DISTANCE = 2000
_DISTANCES = 64
# Fraction of the metric that is the identity, because directions that the text does not contain still matter a little.
_SHRINKAGE = 0.1
# Smallest weight of a layer, as a fraction of the largest: a layer whose gradient vanishes still matters.
_SMALLEST_FISHER = 1e-6


def error_metric(
    query_covariance: torch.Tensor,
    output_weight: torch.Tensor,
    fisher: torch.Tensor,
    inverse_frequencies: torch.Tensor,
) -> torch.Tensor:
    """The metric, f64 `[layers, 2, kv_heads, head_dim, head_dim]`, symmetric positive definite.

    `query_covariance` and `output_weight` (W_o^T W_o) are `[layers, kv_heads, head_dim, head_dim]`, summed over the
    query heads of each KV head; `fisher` is `[layers, 2]`; `inverse_frequencies` `[layers, rotary_dim / 2]` in radians
    per token.

    Raises CalibrationError for values that are not finite or a Fisher information of zero everywhere.
    """
    parts = torch.stack(
        (_seen_through_rope(query_covariance.double(), inverse_frequencies), output_weight.double()), 1
    )
    traces = parts.diagonal(dim1=-2, dim2=-1).mean(-1)
    if not (bool(parts.isfinite().all()) and bool((traces > 0).all())):
        raise CalibrationError("the model's queries or output projections are zero or not finite")
    if not (bool(fisher.isfinite().all()) and bool((fisher >= 0).all()) and bool(fisher.max() > 0)):
        raise CalibrationError("the model's output does not depend on its KV, or its gradient is not finite")
    identity = torch.eye(parts.shape[-1], dtype=torch.float64, device="cpu")
    parts = (1 - _SHRINKAGE) * parts / traces[..., None, None] + _SHRINKAGE * identity
    scalars = fisher.double().clamp_min(_SMALLEST_FISHER * float(fisher.max()))
    return parts * scalars[..., None, None, None]


def square_root(metric: torch.Tensor) -> torch.Tensor:
    """The symmetric square root of symmetric positive definite matrices `[..., n, n]`."""
    values, vectors = torch.linalg.eigh(metric.double())
    if not bool((values > 0).all()):
        raise CalibrationError("the error metric is not positive definite")
    root: torch.Tensor = (vectors * values.sqrt().unsqueeze(-2)) @ vectors.transpose(-1, -2)
    return root


def _seen_through_rope(covariance: torch.Tensor, inverse_frequencies: torch.Tensor) -> torch.Tensor:
    """The covariance after RoPE: the mean of R_d C R_d^T over the distances d."""
    exponents = torch.linspace(0, 1, _DISTANCES, dtype=torch.float64, device="cpu")
    distances = torch.unique((_LONGEST_DISTANCE**exponents).round())
    angles = distances[:, None, None] * inverse_frequencies.detach().cpu().double()
    layers, half = inverse_frequencies.shape
    dim = covariance.shape[-1]
    if 2 * half > dim:
        raise CalibrationError(f"RoPE rotates {2 * half} channels, but heads have only {dim}")
    total = torch.zeros_like(covariance)
    channels = torch.arange(half, device="cpu")
    for angle in angles:
        rotation = torch.eye(dim, dtype=torch.float64, device="cpu").repeat(layers, 1, 1, 1)
        rotation[:, 0, channels, channels] = rotation[:, 0, channels + half, channels + half] = angle.cos()
        rotation[:, 0, channels + half, channels] = angle.sin()
        rotation[:, 0, channels, channels + half] = -angle.sin()
        total += rotation @ covariance @ rotation.mT
    return total / len(angles)
