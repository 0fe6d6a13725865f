"""Rows are checked against the targets, and the gain over IMPRESS is split into parts."""

from typing import Any

import pytest

from kvstore_bench.reprefill.targets import gain, speedups, targets


def row(system: str, ttft_s: float, **fields: Any) -> dict[str, Any]:
    return {
        "system": system, "budget": 0.05, "disk": "balanced", "disk_bandwidth_Bps": 2e8, "ttft_s": ttft_s,
        "p95_s": 2 * ttft_s, "read_amplification": 1.0, "tokens_read": 100.0, "idle_io_fraction": 0.1,
        "idle_compute_fraction": 0.04, "kl": 0.1, "top1": 0.9,
    } | fields  # fmt: skip


ROWS = [
    row("contiguous", 0.2),
    row("contiguous-ahead", 0.19),
    row("contiguous-no-cache", 0.18),
    row("impress", 1.0, idle_compute_fraction=0.7, kl=0.2, top1=0.8, read_amplification=4.0),
    row("impress-16", 0.6, idle_compute_fraction=0.5),
    row("full", 1.2, budget=None, tokens_read=4096.0),
    row("contiguous", 0.2, disk="ssd", read_amplification=1.2),
]


def verdicts() -> dict[tuple[str, str], str]:
    return {(found["target"], found["where"]): found["met"] for found in targets(ROWS)}


def test_targets_are_checked_where_they_hold() -> None:
    where = "balanced, budget 0.05"
    assert verdicts() == {
        ("impress waits for its disk", where): "met",
        ("impress / contiguous", where): "met",
        ("impress / contiguous, 95th percentile", where): "met",
        ("time with / without reads ahead", where): "met",
        ("time with / without cache", where): "missed",
        ("idle disk + idle model", where): "met",
        ("bytes read / needed", where): "met",
        ("tokens read, full / contiguous", where): "met",
        ("KL, contiguous - impress", "budget 0.05"): "met",
        ("top-1, contiguous - impress", "budget 0.05"): "met",
        ("bytes read / needed", "ssd, budget 0.05"): "missed",
    }


def test_what_was_not_measured_is_not_checked() -> None:
    assert targets([row("impress", 1.0)]) == []
    assert gain([row("contiguous", 0.2), row("impress", 1.0)]) == []
    assert speedups([row("impress", 1.0)]) == []


def test_the_parts_of_the_gain_multiply_to_the_whole() -> None:
    product = 1.0
    for part in gain(ROWS):
        product *= part["factor"]
    assert product == pytest.approx(1.0 / 0.2)
    faster = {found["system"]: found for found in speedups(ROWS)}
    assert faster["impress"]["faster"] == pytest.approx(5)
    assert faster["full"]["tokens_read_ratio"] == pytest.approx(40.96)


def test_the_kl_of_a_quarter_is_checked() -> None:
    found = targets([row("contiguous", 0.2, budget=0.25, kl=0.06)])
    assert [(one["target"], one["met"]) for one in found] == [
        ("bytes read / needed", "met"),
        ("KL", "missed"),
    ]
