import pytest
import torch

from kvstore_codec.calibrate import Moments, fit_periods
from kvstore_codec.calibration import PeriodTransform
from kvstore_codec.errors import CalibrationError
from kvstore_codec.klt import token_vectors
from tests.codec.calibrate.texts import (
    DIM,
    FEATURES,
    HEADS,
    LAYERS,
    PERIOD,
    RANK,
    Text,
    identity,
    random_whitening,
    text,
    weights,
)


def moments_of(*texts: Text) -> Moments:
    moments = Moments.empty(
        layers=LAYERS, period_layers=PERIOD, kv_heads=HEADS, head_dim=DIM, features=FEATURES
    )
    for one in texts:
        moments.add_kv(one.keys, one.values, one.features)
    return moments


def residual(one: Text, transform: PeriodTransform, layers: slice) -> torch.Tensor:
    """Whitened, straight from the values."""
    vectors = token_vectors(one.keys[layers], one.values[layers])
    left = vectors - transform.mean - one.features @ transform.predictor_in @ transform.predictor_out
    blocks = transform.whitening.flatten(0, 2)
    return torch.einsum("nij,tnj->tni", blocks, left.reshape(len(left), *blocks.shape[:2])).flatten(1)


def test_a_low_rank_predictor_is_found() -> None:
    one = text(4000, 1, noise=0.01)
    first, second = fit_periods(moments_of(one), identity(), RANK)
    keys, values = weights()
    for transform, layers in ((first, slice(0, 2)), (second, slice(2, 3))):
        true = torch.stack((keys[layers], values[layers]), 1).flatten(0, 3)
        found = (transform.predictor_in @ transform.predictor_out).T
        torch.testing.assert_close(found, true, rtol=0.01, atol=0.01)
        torch.testing.assert_close(transform.mean, torch.full_like(transform.mean, 30.0), rtol=0.01, atol=0)


def test_the_basis_is_the_klt_of_the_residual() -> None:
    """Moments alone give the covariance that the residuals themselves have."""
    texts = [text(600, seed, noise=0.5) for seed in range(3)]
    fitted = fit_periods(moments_of(*texts), random_whitening(), 1)
    for transform, layers in zip(fitted, (slice(0, 2), slice(2, 3)), strict=True):
        left = torch.cat([residual(one, transform, layers) for one in texts]).double()
        assert float(left.mean(0).abs().max()) < 1e-3
        coefficients = left @ transform.basis.double()
        covariance = coefficients.T.cov(correction=0)
        scale = float(transform.variances[0])
        torch.testing.assert_close(
            covariance, transform.variances.double().diag(), rtol=3e-3, atol=3e-4 * scale
        )
        assert bool((transform.variances.diff() <= 0).all())
        eye = torch.eye(transform.values)
        torch.testing.assert_close(transform.basis.T @ transform.basis, eye, rtol=0, atol=1e-3)


def test_more_rank_leaves_less() -> None:
    moments = moments_of(text(2000, 1))
    left = [
        sum(float(transform.variances.sum()) for transform in fit_periods(moments, random_whitening(), rank))
        for rank in (0, 1, 2)
    ]
    assert left[0] > left[1] > left[2]


def test_predictions_suit_half_precision() -> None:
    """Each of the rank's numbers varies by one: nothing gets lost in the subnormals of a tiny metric."""
    one = text(2000, 1)
    transform = fit_periods(moments_of(one), 1e-6 * random_whitening(), RANK)[0]
    deviations = (one.features @ transform.predictor_in).std(0)
    torch.testing.assert_close(deviations, torch.ones(RANK), rtol=1e-2, atol=0)


def test_rank_is_capped_by_what_there_is() -> None:
    moments = moments_of(text(50, 1))
    assert fit_periods(moments, identity(), 1000)[0].predictor_in.shape == (FEATURES, FEATURES)
    assert fit_periods(moments, identity(), 0)[0].predictor_in.shape == (FEATURES, 0)


def test_a_text_of_one_feature_gets_no_predictor() -> None:
    one = text(50, 1)
    one.features[:] = 1.0
    assert fit_periods(moments_of(one), identity(), RANK)[0].predictor_in.shape == (FEATURES, 0)


def test_fitting_twice_gives_the_same_bits() -> None:
    moments = moments_of(text(300, 1))
    first, second = (fit_periods(moments, random_whitening(), RANK)[0] for _ in range(2))
    assert torch.equal(first.basis, second.basis)
    assert torch.equal(first.predictor_in, second.predictor_in)


def test_misfits_are_refused() -> None:
    moments = moments_of(text(50, 1))
    with pytest.raises(CalibrationError, match="rank"):
        fit_periods(moments, identity(), -1)
    with pytest.raises(CalibrationError, match="does not fit"):
        fit_periods(moments, identity()[:2], 1)
    with pytest.raises(CalibrationError, match="too few"):
        fit_periods(moments_of(text(1, 1)), identity(), 1)
