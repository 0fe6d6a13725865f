import pytest
import torch

from kvstore_codec.calibrate import error_metric, square_root
from kvstore_codec.errors import CalibrationError
from kvstore_codec.rope import RotaryTable, rotate_

LAYERS, HEADS, DIM = 2, 3, 8
FREQUENCIES = 0.3 ** torch.arange(DIM // 2)


def covariances(seed: int) -> torch.Tensor:
    root = torch.randn(
        LAYERS, HEADS, DIM, DIM, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    return root @ root.transpose(-1, -2)


def metric(fisher: torch.Tensor | None = None, frequencies: torch.Tensor = FREQUENCIES) -> torch.Tensor:
    fisher = torch.tensor([[1.0, 2.0], [3.0, 4.0]]) if fisher is None else fisher
    return error_metric(covariances(0), covariances(1), fisher, frequencies.expand(LAYERS, -1))


def test_every_layer_and_kind_weighs_what_its_fisher_scalar_says() -> None:
    traces = metric().diagonal(dim1=-2, dim2=-1).mean(-1)
    expected = torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.float64)
    torch.testing.assert_close(traces, expected[..., None].expand(-1, -1, HEADS))


def test_the_root_is_symmetric_and_its_square_the_metric() -> None:
    root = square_root(metric())
    torch.testing.assert_close(root, root.transpose(-1, -2))
    torch.testing.assert_close(root @ root, metric())


def test_values_are_seen_through_the_output_projection_alone() -> None:
    output = covariances(1)[1, 2]
    share = 0.9 * output / output.diagonal().mean() + 0.1 * torch.eye(DIM, dtype=torch.float64)
    torch.testing.assert_close(metric()[1, 1, 2], 4 * share)


def test_keys_are_seen_through_rope() -> None:
    """The metric is the mean squared logit error that a key error makes at the distances, by the codec's own RoPE."""
    query, error = torch.randn(2, DIM, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    distances = torch.unique((2000 ** torch.linspace(0, 1, 64, dtype=torch.float64)).round())
    angles = torch.outer(distances, FREQUENCIES.double()).repeat(1, 2)
    turned = query.repeat(len(distances), 1)
    rotate_(turned, RotaryTable(angles.cos(), angles.sin()))
    seen = (turned @ error).square().mean()
    covariance = torch.outer(query, query).expand(1, 1, DIM, DIM)
    identity = torch.eye(DIM).expand(1, 1, DIM, DIM)
    got = error_metric(covariance, identity, torch.ones(1, 2), FREQUENCIES[None])[0, 0, 0]
    scaled = (error @ got @ error - 0.1 * error @ error) / 0.9 * query.square().mean()
    torch.testing.assert_close(scaled, seen)


def test_every_layer_is_seen_through_a_rope_of_its_own() -> None:
    slower = FREQUENCIES / 7
    both = metric(frequencies=torch.stack((FREQUENCIES, slower)))
    assert torch.equal(both[0], metric()[0])
    assert torch.equal(both[1], metric(frequencies=slower)[1])
    assert not torch.equal(both[1], metric()[1])


def test_a_silent_layer_still_has_a_metric() -> None:
    assert bool((torch.linalg.eigvalsh(metric(torch.tensor([[0.0, 1.0], [1.0, 1.0]]))) > 0).all())


def test_channels_without_rope_are_left_alone() -> None:
    assert torch.equal(metric(frequencies=FREQUENCIES[:2])[:, 1], metric()[:, 1])


def test_bad_statistics_are_refused() -> None:
    with pytest.raises(CalibrationError, match="does not depend"):
        metric(torch.zeros(2, 2))
    with pytest.raises(CalibrationError, match="does not depend"):
        metric(torch.tensor([[1.0, torch.nan], [1.0, 1.0]]))
    with pytest.raises(CalibrationError, match="not finite"):
        error_metric(covariances(0) * torch.inf, covariances(1), torch.ones(2, 2), FREQUENCIES.expand(2, -1))
    with pytest.raises(CalibrationError, match="RoPE rotates"):
        metric(frequencies=torch.ones(DIM))
    with pytest.raises(CalibrationError, match="positive definite"):
        square_root(-torch.eye(3))
