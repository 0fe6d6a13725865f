"""Tuned ratios, kept between runs."""

import json
import logging
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore_client.recompute.tuned import TunedRatios
from kvstore_client.recompute.tuning import Measurement, Tuned

MODEL, OTHER = bytes(range(32)), bytes(32)
DRAM = Tuned(0.21, (Measurement(0.15, 0.5), Measurement(0.21, 0.4)))
DISK = Tuned(0.55, (Measurement(0.55, 1.5),))


def file_of(folder: Path) -> Path:
    return folder / "ratios" / f"{MODEL.hex()}.json"


def test_are_kept_for_each_model_and_tier(tmp_path: Path) -> None:
    ratios = TunedRatios(tmp_path)
    assert ratios.load(MODEL) == {}
    assert ratios.ratio(MODEL, "dram") is None
    ratios.save(MODEL, "dram", DRAM)
    ratios.save(MODEL, "disk", DRAM)
    TunedRatios(tmp_path).save(MODEL, "disk", DISK)
    ratios.save(OTHER, "dram", DISK)
    again = TunedRatios(tmp_path)
    assert again.load(MODEL) == {"dram": DRAM, "disk": DISK}
    assert again.ratio(MODEL, "dram") == 0.21
    assert again.ratio(MODEL, "tape") is None
    assert again.ratio(OTHER, "dram") == 0.55
    assert {path.name for path in (tmp_path / "ratios").iterdir()} == {
        f"{digest.hex()}.json" for digest in (MODEL, OTHER)
    }


@pytest.mark.parametrize(
    "damaged",
    [
        b"",
        b"\xff\xfe",
        b"[]",
        b'"text"',
        b"{}",
        b'{"format": 2, "tiers": {}}',
        b'{"format": 1, "tiers": []}',
        b'{"format": 1, "tiers": {"dram": null}}',
        b'{"format": 1, "tiers": {"dram": {"ratio": 1.5, "measurements": []}}}',
        b'{"format": 1, "tiers": {"dram": {"ratio": NaN, "measurements": []}}}',
        b'{"format": 1, "tiers": {"dram": {"ratio": "0.3", "measurements": []}}}',
        b'{"format": 1, "tiers": {"dram": {"ratio": 0.3, "measurements": [[1]]}}}',
        b'{"format": 1, "tiers": {"dram": {"ratio": 0.3, "measurements": 7}}}',
    ],
)
def test_what_cannot_be_used_is_made_anew(
    tmp_path: Path, damaged: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    ratios = TunedRatios(tmp_path)
    ratios.save(MODEL, "disk", DISK)
    file_of(tmp_path).write_bytes(damaged)
    with caplog.at_level(logging.WARNING):
        assert ratios.load(MODEL) == {}
    assert "kvstore tune" in caplog.text
    ratios.save(MODEL, "dram", DRAM)
    assert ratios.load(MODEL) == {"dram": DRAM}


@settings(max_examples=50, deadline=None)
@given(st.dictionaries(st.sampled_from(["format", "tiers", "dram"]), st.integers() | st.text() | st.none()))
def test_any_document_is_tolerated(tmp_path_factory: pytest.TempPathFactory, data: dict[str, object]) -> None:
    folder = tmp_path_factory.mktemp("ratios")
    file_of(folder).parent.mkdir()
    file_of(folder).write_text(json.dumps(data))
    assert TunedRatios(folder).ratio(MODEL, "dram") is None


def test_a_folder_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "ratios").write_text("in the way")
    with pytest.raises(OSError, match="ratios"):
        TunedRatios(tmp_path).save(MODEL, "dram", DRAM)
