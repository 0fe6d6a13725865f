"""Checks the rows against the targets of selective recompute."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from kvstore_bench.recompute.methods import OURS
from kvstore_bench.targets import at_least, at_most, below

Row = Mapping[str, Any]

_RATIO = 0.15
_CLOSED = 0.6
_PEERS = ("hkvd", "first_k", "frequency")
_ROUNDING = 1e-5
"""Tolerance for rounding: KL of two computations of the same values in float32, nats per token."""
_TOKENS = 3072
_FROM_MEMORY, _FROM_DISK, _THROUGHPUT = 3.72, 2.34, 3.93
_OVER_BEST = 1.05


def targets(rows: Sequence[Row], tuned: Sequence[Row]) -> list[dict[str, Any]]:
    """Rows {target, where, figure, wanted, met}, one per target that these rows allow to check."""
    found: list[dict[str, Any]] = []
    for kind in dict.fromkeys(row["kind"] for row in rows):
        found += _of_kind(kind, [row for row in rows if row["kind"] == kind and row["kl"] is not None])
    found += _of_times(rows)
    for row in tuned:
        if row["prefilled"]:
            continue  # nothing was reused, so there is nothing to check
        if row["tier"] != "dram" and row["tokens"] >= _TOKENS:
            found.append(at_least("full / reused, tuned ratio", _tier(row), row["speedup"], _FROM_DISK))
        found.append(at_most("tuned / best of sweep", _tier(row), row["over_best"], _OVER_BEST))
    return found


def _of_kind(kind: str, rows: Sequence[Row]) -> Iterator[dict[str, Any]]:
    at = {(row["selector"], row["ratio"]): row for row in rows}
    where = f"{kind}, ratio {_RATIO:g}"
    ours = at.get((OURS, _RATIO))
    if ours is not None:
        if ours["closed"] is not None:
            yield at_least("share of the KL gap closed", where, ours["closed"], _CLOSED)
        for peer in _PEERS:
            if (other := at.get((peer, _RATIO))) is not None:
                yield below(f"KL, {OURS} / {peer}", where, ours["kl"] / other["kl"], 1.0)
    everything = [row["kl"] for row in rows if row["ratio"] == 1]
    if everything:
        yield at_most("KL of ratio 1", kind, max(everything), _ROUNDING)


def _of_times(rows: Sequence[Row]) -> Iterator[dict[str, Any]]:
    for row in rows:
        if (row["selector"], row["ratio"], row["tier"]) != (OURS, _RATIO, "dram") or row["tokens"] < _TOKENS:
            continue
        if row["prefilled"]:
            continue  # nothing was reused, so there is nothing to check
        where = f"dram, {row['tokens']} tokens, ratio {_RATIO:g}"
        yield at_least("full / reused", where, row["speedup"], _FROM_MEMORY)
        if row["throughput_tok_s"] is not None:
            gained = row["throughput_tok_s"] / row["full_throughput_tok_s"]
            yield at_least("throughput, reused / full", where, gained, _THROUGHPUT)
        return  # the rows of other kinds have the same times


def _tier(row: Row) -> str:
    return f"{row['tier']}, ratio {row['ratio']:.3g}"
