"""From requests to rows, targets and a picture."""

from pathlib import Path
from typing import Any

import pytest

from kvstore_bench.vllm.completions import Answer
from kvstore_bench.vllm.miss_path import miss_rows
from kvstore_bench.vllm.plot import plot_vllm
from kvstore_bench.vllm.rows import Sample, rows_of
from kvstore_bench.vllm.targets import targets

MBIT = 1e6


def samples(policy: str, bandwidth_bps: float | None, *ttft_s: float, **more: Any) -> list[Sample]:
    return [
        Sample(policy, 2000, bandwidth_bps, number, 0, time_s, **more) for number, time_s in enumerate(ttft_s)
    ]


def rows_by_policy(*groups: list[Sample]) -> dict[str, dict[str, Any]]:
    return {row["policy"]: row for row in rows_of([one for group in groups for one in group], {})}


def test_a_row_has_medians_and_their_spread() -> None:
    rows = rows_by_policy(
        samples("cold", 50 * MBIT, 2.0, 2.2, 2.4),
        samples("adaptive", 50 * MBIT, 0.9, 0.5, 0.7, reused_tokens=1792, link_bytes=1000, same_as_cold=True),
    )
    row = rows["adaptive"]
    assert (row["link"], row["bandwidth_bps"], row["rounds"]) == ("50mbit", 50e6, 3)
    assert (row["ttft_s"], row["ttft_min_s"], row["ttft_max_s"]) == (0.7, 0.5, 0.9)
    assert (row["ttft_q1_s"], row["ttft_q3_s"]) == (pytest.approx(0.6), pytest.approx(0.8))
    assert row["speedup_over_cold"] == pytest.approx(2.2 / 0.7)
    assert (row["reused_tokens"], row["link_bytes"]) == (1792, 1000)
    assert (row["answers_compared"], row["answers_same_as_cold"]) == (3, 3)
    assert rows["cold"]["speedup_over_cold"] == 1


def test_the_first_request_after_a_change_of_the_link_stands_apart() -> None:
    first = samples("adaptive", None, 9.0, counted=False)
    rows = rows_by_policy(samples("cold", None, 2.0), [*first, *samples("adaptive", None, 1.0)])
    assert rows["adaptive"]["ttft_s"] == 1.0
    assert rows["adaptive"]["first_ttft_after_link_change_s"] == 9.0
    assert rows["adaptive"]["link"] == "unshaped"


def test_failures_are_said() -> None:
    failed = Sample("lmcache-raw", 2000, 1e9, 0, 0, None, failure="nothing arrived for 240 s")
    rows = rows_of([*samples("cold", 1e9, 2.0), failed], {"lmcache-fp8": "it did not start"})
    by_policy = {row["policy"]: row for row in rows}
    assert by_policy["lmcache-raw"]["failed_requests"] == 1
    assert by_policy["lmcache-raw"]["failure"] == "nothing arrived for 240 s"
    assert by_policy["lmcache-raw"]["ttft_s"] is None
    assert by_policy["lmcache-fp8"] == {"policy": "lmcache-fp8", "failure": "it did not start"}
    assert targets(rows) == []


def test_targets_are_of_the_links_that_were_measured() -> None:
    measured = [
        *samples("cold", 100 * MBIT, 2.0),
        *samples("adaptive", 100 * MBIT, 0.5),
        *samples("lmcache-fp8", 100 * MBIT, 1.4),
        *samples("cold", None, 2.0),
        *samples("adaptive", None, 0.5),
        *samples("lmcache-raw", None, 0.5),
    ]
    found = {(one["target"], one["where"]): one["met"] for one in targets(rows_of(measured, {}))}
    assert found == {
        ("adaptive / cold", "2000 tokens, 100mbit"): "met",
        ("lmcache-fp8 / adaptive", "2000 tokens, 100mbit"): "missed",
        ("cold / adaptive", "2000 tokens, 100mbit"): "met",
        ("adaptive / cold", "2000 tokens, unshaped"): "met",
        ("adaptive / lmcache-raw", "2000 tokens, unshaped"): "met",
    }


def test_the_miss_path_is_compared_round_by_round() -> None:
    rows = miss_rows(
        {
            "cold": [Answer(1.0, 2.0, (1, 2), 0), Answer(2.0, 3.0, (1, 2), 0), Answer(4.0, 5.0, (1, 2), 0)],
            "empty-store": [
                Answer(1.1, 2.1, (1, 2), 0), Answer(2.0, 4.0, (1, 2), 0), Answer(4.0, 6.0, (1, 2), 0)
            ],
        }
    )  # fmt: skip
    assert [row["ttft_over_cold"] for row in rows] == [1, 1]
    assert [row["decode_time_over_cold"] for row in rows] == [1, 2]
    assert [row["met"] for row in rows] == [True, False]


def test_the_picture_is_a_png(tmp_path: Path) -> None:
    rows = rows_of(
        [
            *samples("cold", None, 2.0, 2.1),
            *samples("adaptive", 10 * MBIT, 1.5),
            Sample("lmcache-raw", 4000, None, 0, 0, 1.0),
        ],
        {"lmcache-fp8": "it did not start"},
    )
    plot_vllm(rows, tmp_path / "ttft.png")
    assert (tmp_path / "ttft.png").read_bytes().startswith(b"\x89PNG\r\n")


def test_nothing_measured_makes_no_picture(tmp_path: Path) -> None:
    plot_vllm(rows_of([], {"cold": "it did not start"}), tmp_path / "ttft.png")
    assert not (tmp_path / "ttft.png").exists()
