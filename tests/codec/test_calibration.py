from __future__ import annotations

import dataclasses

import pytest
import torch

from kvstore_codec.calibration import Calibration, token_features
from kvstore_codec.errors import CalibrationError
from tests.codec.chunks import make_calibration, make_spec

SPEC = make_spec(layers=6)


def test_bytes_hold_a_calibration_to_the_last_bit() -> None:
    calibration = make_calibration(SPEC)
    data = calibration.to_bytes()
    again = Calibration.from_bytes(data)
    assert again.to_bytes() == data
    assert again.digest == calibration.digest
    assert (again.steps, again.errors, again.sinks) == (calibration.steps, calibration.errors, 4)
    assert again.provenance == {"text": "none"}
    for one, other in zip(again.periods, calibration.periods, strict=True):
        for field in dataclasses.fields(one):
            assert torch.equal(getattr(one, field.name), getattr(other, field.name)), field.name


def test_damaged_bytes_are_refused() -> None:
    data = make_calibration(SPEC).to_bytes()
    for bad in (b"", data[:7], data[:100], data[:-1], b"x" + data[1:], bytes(8) + data[8:], b"\xff" * 64):
        with pytest.raises(CalibrationError):
            Calibration.from_bytes(bad)
    for name in (b"basis", b"kvstore", b"F32"):
        with pytest.raises(CalibrationError):
            Calibration.from_bytes(data.replace(name, name[::-1]))


def test_a_later_version_is_refused_by_name() -> None:
    data = make_calibration(SPEC).to_bytes()
    newer = data.replace(b'\\"version\\": 2', b'\\"version\\": 9')
    assert newer != data
    with pytest.raises(CalibrationError, match="version 9"):
        Calibration.from_bytes(newer)


def test_another_model_is_refused() -> None:
    calibration = make_calibration(SPEC)
    calibration.require(SPEC)
    with pytest.raises(CalibrationError, match="kvstore calibrate"):
        calibration.require(make_spec(layers=6, head_dim=64))
    of_one = {rate: errors[:1] for rate, errors in calibration.errors.items()}
    with pytest.raises(CalibrationError, match="shapes"):
        dataclasses.replace(calibration, periods=calibration.periods[:1], errors=of_one).require(SPEC)


@pytest.mark.parametrize(
    "change",
    [
        {"steps": {"high": 0.0}, "errors": {"high": (1.0, 1.0)}},
        {"steps": {"high": float("nan")}, "errors": {"high": (1.0, 1.0)}},
        {"steps": {"high": 1.0}, "errors": {}},
        {"steps": {"high": 1.0}, "errors": {"high": (1.0,)}},
        {"steps": {"high": 1.0}, "errors": {"high": (1.0, 0.0)}},
        {"periods": ()},
        {"sinks": -1},
        {"period_layers": 3},
    ],
)
def test_parts_that_do_not_fit_are_refused(change: dict[str, object]) -> None:
    with pytest.raises(CalibrationError):
        dataclasses.replace(make_calibration(SPEC), **change)  # type: ignore[arg-type]


def test_a_transform_checks_its_maps() -> None:
    period = make_calibration(SPEC).periods[0]
    for name in ("mean", "basis", "whitening", "predictor_in", "predictor_out", "variances"):
        tensor = getattr(period, name).clone()
        with pytest.raises(CalibrationError):
            dataclasses.replace(period, **{name: tensor[..., :-1].double()})
        tensor[(0,) * tensor.ndim] = float("nan")
        with pytest.raises(CalibrationError, match="NaN"):
            dataclasses.replace(period, **{name: tensor})


def test_features_are_the_token_and_the_one_before_at_one_scale() -> None:
    rows = torch.randn(5, 16)
    features = token_features(1000 * rows)
    assert features.shape == (5, 32)
    assert torch.allclose(features[:, :16].square().mean(1), torch.ones(5), atol=1e-4)
    assert torch.equal(features[1:, 16:], features[:-1, :16])
    assert not features[0, 16:].any()
    behind = token_features(rows[2:], previous=rows[1])
    assert torch.allclose(behind, token_features(rows)[2:])
