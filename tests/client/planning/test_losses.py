"""What parts of a prefix lose: interpolated carefully, kept per model, and never invented."""

import json
import math
from pathlib import Path

import pytest

from kvstore_client.planning.losses import LossTable, PartLosses

LOSSES = PartLosses.of([(0.5, 0.01), (0.05, 0.3), (0.25, 0.06)])
WEIGHTS = bytes(range(32))


def test_a_part_loses_what_the_next_smaller_measured_one_does() -> None:
    assert LOSSES.shares == (0.05, 0.25, 0.5)
    assert [LOSSES.at(share) for share in (0.05, 0.2, 0.25, 0.4, 0.9, 1.0)] == [
        0.3,
        0.3,
        0.06,
        0.06,
        0.01,
        0.0,
    ]


def test_below_all_measurements_nothing_is_known() -> None:
    assert LOSSES.at(0.04) == math.inf
    assert PartLosses(()).at(0.9) == math.inf
    assert PartLosses(()).at(1.0) == 0.0


def test_a_larger_part_never_loses_more() -> None:
    assert PartLosses.of([(0.25, 0.06), (0.5, 0.07)]).at(0.5) == 0.06


@pytest.mark.parametrize("pair", [(0.0, 0.1), (1.0, 0.1), (0.5, -0.1), (0.5, math.inf), (0.5, math.nan)])
def test_what_is_no_measurement_is_refused(pair: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="a loss of"):
        PartLosses.of([pair])


def test_losses_are_kept_for_their_model(tmp_path: Path) -> None:
    table = LossTable(tmp_path)
    assert table.load(WEIGHTS) == PartLosses(())
    table.save(WEIGHTS, LOSSES, {"command": "test"})
    assert LossTable(tmp_path).load(WEIGHTS) == LOSSES
    assert table.load(bytes(32)) == PartLosses(())


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{}",
        json.dumps({"format": 1, "losses": [[0.25, 0.1]]}).encode(),  # of frames chosen by another rule
        json.dumps({"format": 2, "losses": [[0.25, 0.1]]}).encode(),
        json.dumps({"format": 3, "losses": [[2, 1]]}).encode(),
    ],
)
def test_a_damaged_file_tells_nothing(tmp_path: Path, data: bytes, caplog: pytest.LogCaptureFixture) -> None:
    table = LossTable(tmp_path)
    table.save(WEIGHTS, LOSSES, {})
    table.path(WEIGHTS).write_bytes(data)
    assert table.load(WEIGHTS) == PartLosses(())
    assert "cannot be used" in caplog.text
