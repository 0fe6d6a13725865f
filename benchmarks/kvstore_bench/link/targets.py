"""What the fetcher has to show, and whether it did."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

from kvstore_service.bandwidth import format_bandwidth

Row = Mapping[str, Any]

_100_MBIT = 100e6
_SLOWER_THAN_FIXED, _SLOWER_THAN_COLD, _LONGEST_STAGE = 1.05, 1.02, 1.15
_RAW, _CACHEGEN, _COLD = 6.0, 2.5, 13.6
_REPLANNED = 0.8


def targets(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """{target, where, figure, wanted, met}; what cannot be said of these rows is left out."""
    found: list[dict[str, Any]] = []
    cells = [
        {row["policy"]: row for row in cell}
        for _, cell in groupby(rows, key=lambda row: (row["tokens"], row["jitter"], row["bandwidth_bps"]))
    ]
    cells = [cell for cell in cells if "adaptive" in cell]
    for cell in cells:
        found += _of_cell(cell)
    if cells:
        soonest = max((cell["adaptive"] for cell in cells), key=_speedup)
        found.append(_at_least("cold / adaptive, best point", soonest, _speedup(soonest), _COLD))
    return found


def _of_cell(cell: Mapping[str, Row]) -> Iterator[dict[str, Any]]:
    adaptive = cell["adaptive"]
    fixed = [row for row in cell.values() if row["kind"] == "fixed" and row["meets_floor"]]
    if fixed:
        best = min(fixed, key=lambda row: row["ttft_s"])
        name = f"adaptive / best fixed ({best['policy']})"
        yield _at_most(name, adaptive, adaptive["ttft_s"] / best["ttft_s"], _SLOWER_THAN_FIXED)
    yield _at_most(
        "adaptive / cold", adaptive, adaptive["ttft_s"] / adaptive["cold_ttft_s"], _SLOWER_THAN_COLD
    )
    yield _at_most(
        "adaptive / its longest stage", adaptive, adaptive["ttft_over_longest_stage"], _LONGEST_STAGE
    )
    if adaptive["bandwidth_bps"] == _100_MBIT and adaptive["jitter"] == "none":
        if "raw" in cell:
            yield _at_least("raw / adaptive", adaptive, cell["raw"]["ttft_s"] / adaptive["ttft_s"], _RAW)
        if "cachegen" in cell:
            peer = cell["cachegen"]
            sooner = peer["ttft_s"] / adaptive["ttft_s"]
            yield _at_least("cachegen / adaptive", adaptive, sooner, _CACHEGEN)
            yield _at_most("KL, adaptive / cachegen", adaptive, adaptive["kl"] / peer["kl"], 1.0)
    if "adaptive-kept" in cell and adaptive["jitter"].startswith("step"):
        kept = cell["adaptive-kept"]
        yield _at_most("adaptive / plan kept", adaptive, adaptive["ttft_s"] / kept["ttft_s"], _REPLANNED)


def _speedup(row: Row) -> float:
    return float(row["cold_ttft_s"] / row["ttft_s"])


def _at_most(target: str, row: Row, figure: float, limit: float) -> dict[str, Any]:
    return _target(target, row, figure, f"<= {limit:g}", met=figure <= limit)


def _at_least(target: str, row: Row, figure: float, limit: float) -> dict[str, Any]:
    return _target(target, row, figure, f">= {limit:g}", met=figure >= limit)


def _target(target: str, row: Row, figure: float, wanted: str, *, met: bool) -> dict[str, Any]:
    jitter = "" if row["jitter"] == "none" else f", {row['jitter']}"
    where = f"{row['tokens']} tokens, {format_bandwidth(row['bandwidth_bps'])}{jitter}"
    said = "met" if met else "missed"
    return {"target": target, "where": where, "figure": figure, "wanted": wanted, "met": said}
