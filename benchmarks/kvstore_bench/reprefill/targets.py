"""Checks the rows against the targets of re-prefill, and splits the gain over IMPRESS into its parts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from kvstore_bench.targets import at_least, at_most, below

Row = Mapping[str, Any]
_Cell = Mapping[str, Row]
"""Rows on one disk at one budget, by system."""

_BUDGET = 0.05
_FASTER, _FEWER_TOKENS, _AMPLIFICATION = 3.85, 16.0, 1.05
_WAITING = 0.65, 0.75
_IDLE = 0.15
_KL_BUDGET, _KL = 0.25, 0.05
_PARTS = (
    ("reads ahead", "contiguous-ahead", "contiguous"),
    ("reads by period", "contiguous", "contiguous-by-layer"),
    ("cache", "contiguous", "contiguous-no-cache"),
)
"""Parts of the system, with a row that has the part and one that lacks it."""
_STEPS = (
    ("impress", "impress-16", "chunks of 16 instead of 64 tokens"),
    ("impress-16", "contiguous-no-cache", "sets by period and summary, whole frames, coded"),
    ("contiguous-no-cache", "contiguous", "cache of frames"),
)
"""From IMPRESS to ours, one part at a time."""


def targets(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Rows {target, where, figure, wanted, met}, one per target that these rows allow to check."""
    found: list[dict[str, Any]] = []
    for (disk, budget), cell in _cells(rows).items():
        where = f"{disk}, budget {budget:g}"
        if budget == _BUDGET:
            found += _of_time(disk, where, cell)
        found += _of_reading(where, cell)
    judged: set[float] = set()
    for (_, budget), cell in _cells(rows).items():
        if budget not in judged:
            judged.add(budget)
            found += _of_quality(budget, cell)
    return found


def speedups(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """How many times faster than each other system ours is, in the median and at the 95th percentile, on every disk at
    every budget."""
    return [
        {
            "disk": disk,
            "disk_bandwidth_Bps": cell["contiguous"]["disk_bandwidth_Bps"],
            "budget": budget,
            "system": name,
            "faster": _ratio(cell, name, "contiguous"),
            "faster_p95": cell[name]["p95_s"] / cell["contiguous"]["p95_s"],
            "idle_compute_fraction": row["idle_compute_fraction"],
            "tokens_read_ratio": _fewer_tokens(cell, name),
        }
        for (disk, budget), cell in _cells(rows).items()
        if "contiguous" in cell
        for name, row in cell.items()
        if name != "contiguous"
    ]


def gain(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """What each step from IMPRESS to ours gains: the factors, whose product is the whole gain."""
    return [
        {"disk": disk, "budget": budget, "part": part, "factor": _ratio(cell, before, after)}
        for (disk, budget), cell in _cells(rows).items()
        if {name for step in _STEPS for name in step[:2]} <= cell.keys()
        for before, after, part in _STEPS
    ]


def _cells(rows: Sequence[Row]) -> dict[tuple[str, float], dict[str, Row]]:
    """Systems that have no budget are in the cells of all budgets of their disk."""
    cells: dict[tuple[str, float], dict[str, Row]] = {}
    for row in rows:
        if row["budget"] is not None:
            cells.setdefault((row["disk"], row["budget"]), {})[row["system"]] = row
    for row in rows:
        if row["budget"] is None:
            for (disk, _), cell in cells.items():
                if disk == row["disk"]:
                    cell[row["system"]] = row
    return cells


def _of_time(disk: str, where: str, cell: _Cell) -> Iterator[dict[str, Any]]:
    if "contiguous" not in cell:
        return
    ours = cell["contiguous"]
    if disk == "balanced" and "impress" in cell:
        waiting = cell["impress"]["idle_compute_fraction"]
        yield at_least("impress waits for its disk", where, waiting, _WAITING[0])
        yield at_most("impress waits for its disk", where, waiting, _WAITING[1])
        yield at_least("impress / contiguous", where, _ratio(cell, "impress", "contiguous"), _FASTER)
        slow = cell["impress"]["p95_s"] / ours["p95_s"]
        yield at_least("impress / contiguous, 95th percentile", where, slow, _FASTER)
    if disk in ("balanced", "even"):
        for part, having, lacking in _PARTS:
            if {having, lacking} <= cell.keys():
                yield below(f"time with / without {part}", where, _ratio(cell, having, lacking), 1)
        idle = ours["idle_io_fraction"] + ours["idle_compute_fraction"]
        yield below("idle disk + idle model", where, idle, _IDLE)


def _of_reading(where: str, cell: _Cell) -> Iterator[dict[str, Any]]:
    ours = cell.get("contiguous")
    if ours is None:
        return
    if ours["read_amplification"] is not None:
        yield at_most("bytes read / needed", where, ours["read_amplification"], _AMPLIFICATION)
    if "full" in cell and ours["budget"] == _BUDGET:
        yield at_least("tokens read, full / contiguous", where, _fewer_tokens(cell, "full"), _FEWER_TOKENS)


def _of_quality(budget: float, cell: _Cell) -> Iterator[dict[str, Any]]:
    ours, peer = cell.get("contiguous"), cell.get("impress")
    if ours is None or ours["kl"] is None:
        return
    where = f"budget {budget:g}"
    if budget == _KL_BUDGET:
        yield at_most("KL", where, ours["kl"], _KL)
    if peer is not None and peer["kl"] is not None:
        yield at_most("KL, contiguous - impress", where, ours["kl"] - peer["kl"], 0)
        yield at_least("top-1, contiguous - impress", where, ours["top1"] - peer["top1"], 0)


def _ratio(cell: _Cell, name: str, over: str) -> float:
    return float(cell[name]["ttft_s"] / cell[over]["ttft_s"])


def _fewer_tokens(cell: _Cell, name: str) -> float:
    """How many times more tokens the system reads than ours, which may read less than one if its cache has all."""
    return float(cell[name]["tokens_read"] / max(1.0, cell["contiguous"]["tokens_read"]))
