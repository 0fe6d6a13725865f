"""Which errors in KV a model notices.

An error e in a key changes the logit of a query q by q^T e, so its weight is E[q q^T], seen through RoPE; an error in
a value is seen through the output projection W_o. How much a whole layer's keys or values matter is one scalar, the
Fisher information tr E[g g^T] / dim, where g is the gradient of the log-likelihood of labels drawn from the model
itself (Amari, "Natural Gradient Works Efficiently in Learning", 1998): the KL divergence is its quadratic form.
"""

import torch

from kvstore_codec.errors import CalibrationError

# Distances between a query and a key that the key metric is averaged over, log-spaced.
_LONGEST_DISTANCE = 2000
_DISTANCES = 64
# Directions the text never showed still matter a little: this share of the metric is the identity.
_SHRINKAGE = 0.1
# A layer whose gradient vanished still has errors of some weight.
_SMALLEST_FISHER = 1e-6


def error_metric(
    query_covariance: torch.Tensor,
    output_weight: torch.Tensor,
    fisher: torch.Tensor,
    inverse_frequencies: torch.Tensor,
) -> torch.Tensor:
    """f64 `[layers, 2, kv_heads, head_dim, head_dim]`, symmetric positive definite.

    `query_covariance` and `output_weight` (W_o^T W_o) are `[layers, kv_heads, head_dim, head_dim]`, summed over the
    query heads of each KV head; `fisher` is `[layers, 2]`; `inverse_frequencies` `[layers, rotary_dim / 2]` in radians
    a token.

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
    """The mean of R_d C R_d^T over the distances d."""
    exponents = torch.linspace(0, 1, _DISTANCES, dtype=torch.float64, device="cpu")
    distances = torch.unique((_LONGEST_DISTANCE**exponents).round())
    angles = distances[:, None, None] * inverse_frequencies.detach().cpu().double()
    layers, half = inverse_frequencies.shape
    dim = covariance.shape[-1]
    if 2 * half > dim:
        raise CalibrationError(f"RoPE turns {2 * half} channels of heads that have {dim}")
    total = torch.zeros_like(covariance)
    channels = torch.arange(half, device="cpu")
    for angle in angles:
        rotation = torch.eye(dim, dtype=torch.float64, device="cpu").repeat(layers, 1, 1, 1)
        rotation[:, 0, channels, channels] = rotation[:, 0, channels + half, channels + half] = angle.cos()
        rotation[:, 0, channels + half, channels] = angle.sin()
        rotation[:, 0, channels, channels + half] = -angle.sin()
        total += rotation @ covariance @ rotation.mT
    return total / len(angles)
