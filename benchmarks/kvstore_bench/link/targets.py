"""Checks the rows against the targets of adaptive fetching."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

from kvstore_bench.targets import at_least, at_most
from kvstore_service.bandwidth import format_bandwidth

Row = Mapping[str, Any]

_100_MBIT = 100e6
_SLOWER_THAN_FIXED, _SLOWER_THAN_COLD, _LONGEST_STAGE = 1.05, 1.02, 1.15
_RAW, _CACHEGEN, _COLD = 6.0, 2.5, 13.6
_REPLANNED = 0.8


def targets(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Rows {target, where, figure, wanted, met}, one per target that these rows allow to check."""
    found: list[dict[str, Any]] = []
    cells = [
        {row["policy"]: row for row in cell}
        for _, cell in groupby(rows, key=lambda row: (row["tokens"], row["jitter"], row["bandwidth_bps"]))
    ]
    cells = [cell for cell in cells if "adaptive" in cell]
    for cell in cells:
        found += _of_cell(cell)
    if cells:
        best = max((cell["adaptive"] for cell in cells), key=_speedup)
        found.append(at_least("cold / adaptive, best point", _where(best), _speedup(best), _COLD))
    return found


def _of_cell(cell: Mapping[str, Row]) -> Iterator[dict[str, Any]]:
    adaptive = cell["adaptive"]
    where, ttft_s = _where(adaptive), adaptive["ttft_s"]
    fixed = [row for row in cell.values() if row["kind"] == "fixed" and row["meets_floor"]]
    if fixed:
        best = min(fixed, key=lambda row: row["ttft_s"])
        name = f"adaptive / best fixed ({best['policy']})"
        yield at_most(name, where, ttft_s / best["ttft_s"], _SLOWER_THAN_FIXED)
    yield at_most("adaptive / cold", where, ttft_s / adaptive["cold_ttft_s"], _SLOWER_THAN_COLD)
    yield at_most("adaptive / its longest stage", where, adaptive["ttft_over_longest_stage"], _LONGEST_STAGE)
    if adaptive["bandwidth_bps"] == _100_MBIT and adaptive["jitter"] == "none":
        if "raw" in cell:
            yield at_least("raw / adaptive", where, cell["raw"]["ttft_s"] / ttft_s, _RAW)
        if "cachegen" in cell:
            peer = cell["cachegen"]
            yield at_least("cachegen / adaptive", where, peer["ttft_s"] / ttft_s, _CACHEGEN)
            yield at_most("KL, adaptive / cachegen", where, adaptive["kl"] / peer["kl"], 1.0)
    if "adaptive-kept" in cell and adaptive["jitter"].startswith("step"):
        kept = cell["adaptive-kept"]
        yield at_most("adaptive / plan kept", where, ttft_s / kept["ttft_s"], _REPLANNED)


def _speedup(row: Row) -> float:
    return float(row["cold_ttft_s"] / row["ttft_s"])


def _where(row: Row) -> str:
    jitter = "" if row["jitter"] == "none" else f", {row['jitter']}"
    return f"{row['tokens']} tokens, {format_bandwidth(row['bandwidth_bps'])}{jitter}"
