"""What selective recompute has to show, and whether it did."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from kvstore_bench.recompute.methods import OURS

Row = Mapping[str, Any]

_RATIO = 0.15
_CLOSED = 0.6
_PEERS = ("hkvd", "first_k", "frequency")
_ROUNDING = 1e-5
"""Nats a token between two ways to compute the same in float32."""
_TOKENS = 3072
_FROM_MEMORY, _FROM_DISK, _THROUGHPUT = 3.72, 2.34, 3.93
_OVER_BEST = 1.05


def targets(rows: Sequence[Row], tuned: Sequence[Row]) -> list[dict[str, Any]]:
    """{target, where, figure, wanted, met}; what cannot be said of these rows is left out."""
    found: list[dict[str, Any]] = []
    for kind in dict.fromkeys(row["kind"] for row in rows):
        found += _of_kind(kind, [row for row in rows if row["kind"] == kind and row["kl"] is not None])
    found += _of_times(rows)
    for row in tuned:
        if row["prefilled"]:
            continue  # nothing was reused, so nothing is shown
        if row["tier"] != "dram" and row["tokens"] >= _TOKENS:
            found.append(_at_least("full / reused, tuned ratio", _tier(row), row["speedup"], _FROM_DISK))
        found.append(_at_most("tuned / best of sweep", _tier(row), row["over_best"], _OVER_BEST))
    return found


def _of_kind(kind: str, rows: Sequence[Row]) -> Iterator[dict[str, Any]]:
    at = {(row["selector"], row["ratio"]): row for row in rows}
    where = f"{kind}, ratio {_RATIO:g}"
    ours = at.get((OURS, _RATIO))
    if ours is not None:
        if ours["closed"] is not None:
            yield _at_least("share of the KL gap closed", where, ours["closed"], _CLOSED)
        for peer in _PEERS:
            if (other := at.get((peer, _RATIO))) is not None:
                yield _below(f"KL, {OURS} / {peer}", where, ours["kl"] / other["kl"], 1.0)
    everything = [row["kl"] for row in rows if row["ratio"] == 1]
    if everything:
        yield _at_most("KL of ratio 1", kind, max(everything), _ROUNDING)


def _of_times(rows: Sequence[Row]) -> Iterator[dict[str, Any]]:
    for row in rows:
        if (row["selector"], row["ratio"], row["tier"]) != (OURS, _RATIO, "dram") or row["tokens"] < _TOKENS:
            continue
        if row["prefilled"]:
            continue  # nothing was reused, so nothing is shown
        where = f"dram, {row['tokens']} tokens, ratio {_RATIO:g}"
        yield _at_least("full / reused", where, row["speedup"], _FROM_MEMORY)
        if row["throughput_tok_s"] is not None:
            gained = row["throughput_tok_s"] / row["full_throughput_tok_s"]
            yield _at_least("throughput, reused / full", where, gained, _THROUGHPUT)
        return  # the rows of other kinds say the same


def _tier(row: Row) -> str:
    return f"{row['tier']}, ratio {row['ratio']:.3g}"


def _at_most(target: str, where: str, figure: float, limit: float) -> dict[str, Any]:
    return _target(target, where, figure, f"<= {limit:g}", met=figure <= limit)


def _below(target: str, where: str, figure: float, limit: float) -> dict[str, Any]:
    return _target(target, where, figure, f"< {limit:g}", met=figure < limit)


def _at_least(target: str, where: str, figure: float, limit: float) -> dict[str, Any]:
    return _target(target, where, figure, f">= {limit:g}", met=figure >= limit)


def _target(target: str, where: str, figure: float, wanted: str, *, met: bool) -> dict[str, Any]:
    said = "met" if met else "missed"
    return {"target": target, "where": where, "figure": figure, "wanted": wanted, "met": said}
