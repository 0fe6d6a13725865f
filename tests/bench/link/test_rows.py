"""From measured samples to rows and targets."""

from pathlib import Path
from typing import Any

import pytest

from kvstore_bench.link.options import Options
from kvstore_bench.link.plot import plot_link
from kvstore_bench.link.policies import policy_named
from kvstore_bench.link.rows import Cell, Row, row_of
from kvstore_bench.link.targets import targets
from kvstore_bench.shaping.jitter import parse_jitter
from kvstore_codec.encoding import Rate

OPTIONS = Options([1e8], [1024], ["raw", "medium-klt-pco", "cachegen", "adaptive"])


def cell(bandwidth_bps: float = 1e8, jitter: str = "none") -> Cell:
    return Cell(bandwidth_bps, 1024, jitter, parse_jitter(jitter).schedule(bandwidth_bps))


def sample(ttft_s: float, longest_s: float = 0.1, **more: Any) -> dict[str, Any]:
    stages = {"receive": longest_s, "decode": 0.01, "restore": 0.0, "compute": 0.02, "lookup": 9.0}
    return {
        "ttft_s": ttft_s,
        "bytes": 1000,
        "reused_tokens": 1024,
        "computed_tokens": 40,
        "stage_s": stages,
        "replans": 0,
        "encodings": [],
    } | more


def rows_of(at: Cell, **ttfts_s: float) -> list[Row]:
    names = [name.replace("_", "-") for name in ttfts_s]
    samples = {
        name: [sample(99.0), sample(ttft_s)] for name, ttft_s in zip(names, ttfts_s.values(), strict=True)
    }
    judged = {
        (name, 1024): {"kl": 0.02 if name == "cachegen" else 0.01, "same_tokens": True} for name in names
    }
    return [row_of(at, policy_named(name, Rate.MEDIUM, {}), samples, judged, OPTIONS) for name in names]


def test_a_row_says_the_median_and_the_spread_without_the_warm_up() -> None:
    samples = {
        "cold": [sample(9.0), sample(2.0), sample(4.0)],
        "adaptive": [sample(50.0), *(sample(t, replans=int(t)) for t in (1.0, 2.0, 3.0, 4.0, 5.0))],
    }
    judged = {("adaptive", 1024): {"kl": 0.01, "same_tokens": False}}
    row = row_of(cell(), policy_named("adaptive", Rate.MEDIUM, {}), samples, judged, OPTIONS)
    assert row["ttft_s"] == 3.0
    assert (row["ttft_min_s"], row["ttft_q1_s"], row["ttft_q3_s"], row["ttft_max_s"]) == (1.0, 2.0, 4.0, 5.0)
    assert row["cold_ttft_s"] == 3.0
    assert (row["repeats"], row["replans"], row["kl"], row["same_tokens"]) == (5, 5, 0.01, False)
    assert row["ttft_over_longest_stage"] == pytest.approx(30.0)
    assert set(row["stage_s"]) == {"receive", "decode", "restore", "compute"}


def test_who_was_asked_once_has_no_warm_up() -> None:
    samples = {"cold": [sample(1.0), sample(2.0)], "raw": [sample(70.0)]}
    judged = {("raw", 1024): {"kl": 0.0, "same_tokens": True}}
    row = row_of(cell(), policy_named("raw", Rate.MEDIUM, {}), samples, judged, OPTIONS)
    assert (row["ttft_s"], row["ttft_q1_s"], row["ttft_max_s"], row["repeats"]) == (70.0, 70.0, 70.0, 1)


def test_adaptive_meets_the_floor_by_what_it_fetched() -> None:
    judged = {("adaptive", 1024): {"kl": 0.0, "same_tokens": True}}
    for encodings, meets in (
        (["exact-zstd", "medium-klt-pco"], True),
        (["exact-zstd", "low-klt-pco"], False),
    ):
        samples = {"cold": [sample(1.0)], "adaptive": [sample(1.0), sample(1.0, encodings=encodings)]}
        row = row_of(cell(), policy_named("adaptive", Rate.MEDIUM, {}), samples, judged, OPTIONS)
        assert row["meets_floor"] is meets


def test_targets_say_what_was_met() -> None:
    rows = rows_of(
        cell(), cold=14.0, raw=7.0, low_klt_pco=0.5, medium_klt_pco=1.0, cachegen=2.0, adaptive=1.0
    )
    said = {row["target"]: (row["figure"], row["met"]) for row in targets(rows)}
    assert said["adaptive / best fixed (medium-klt-pco)"] == (1.0, "met")  # low is below the floor
    assert said["adaptive / cold"] == (pytest.approx(1 / 14), "met")
    assert said["adaptive / its longest stage"] == (pytest.approx(10.0), "missed")
    assert said["raw / adaptive"] == (7.0, "met")
    assert said["cachegen / adaptive"] == (2.0, "missed")
    assert said["KL, adaptive / cachegen"] == (0.5, "met")
    assert said["cold / adaptive, best point"] == (14.0, "met")


def test_some_targets_are_those_of_one_circumstance_only() -> None:
    elsewhere = {row["target"] for row in targets(rows_of(cell(1e9), cold=1.0, raw=1.0, adaptive=1.0))}
    assert "raw / adaptive" not in elsewhere
    step = cell(1e9, "step")
    replanned = targets(rows_of(step, cold=9.0, adaptive=1.0, adaptive_kept=2.0))
    (found,) = [row for row in replanned if row["target"] == "adaptive / plan kept"]
    assert (found["figure"], found["met"], found["where"]) == (0.5, "met", "1024 tokens, 1gbit, step")
    assert targets(rows_of(cell(), cold=1.0, raw=1.0)) == []


def test_the_picture_has_a_panel_for_each_length_and_jitter(tmp_path: Path) -> None:
    rows = [
        row
        for jitter in ("none", "step")
        for rate in (1e8, 1e9)
        for row in rows_of(cell(rate, jitter), cold=2.0, medium_klt_pco=1.0, adaptive=1.0)
    ]
    plot_link(rows, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
