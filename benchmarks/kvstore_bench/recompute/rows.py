"""Makes the rows of the result from the measurements."""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from kvstore_bench.recompute.engine import Asked
from kvstore_bench.recompute.fidelity import Fidelity
from kvstore_bench.recompute.methods import Cell
from kvstore_bench.recompute.times import Batches, Race
from kvstore_bench.recompute.tuning import TunedTier

Row = dict[str, Any]


def rows_of(
    tier: str,
    race: Race,
    batches: Batches | None,
    fidelity: Fidelity,
    tokens: int,
    *,
    tuned: bool = False,
    only: Sequence[Cell] | None = None,
) -> Iterator[Row]:
    """One row per kind of prompt and cell of the race, or only for the cells in `only`. `tokens` is the number of
    document tokens in the timed prompt. Times do not depend on the kind: the rows of all kinds have the same times."""
    for kind in dict.fromkeys(kind for kind, _, _ in fidelity):
        for cell, asked in race.asked.items():
            if only is None or cell in only:
                yield {
                    "kind": kind,
                    "selector": cell.method.name,
                    "ratio": cell.ratio,
                    "tier": tier,
                    **_fidelity(fidelity, kind, cell),
                    **_times(asked, race.full_s),
                    **_throughput(cell, batches),
                    "tokens": tokens,
                    "tuned": tuned,
                }


def tuned_row(tier: str, found: TunedTier, tokens: int) -> Row:
    """Compares the tuned ratio with the sweep."""
    swept = {cell.ratio: _median(found.race.asked[cell]) for cell in found.sweep}
    best = min(swept, key=lambda ratio: swept[ratio])
    ttft_s, full_s = _median(found.race.asked[found.cell]), statistics.median(found.race.full_s)
    return {
        "tier": tier,
        "tokens": tokens,
        "selector": found.cell.method.name,
        "ratio": found.cell.ratio,
        "first_ratio": found.first,
        "measurements": found.measurements,
        "ttft_s": ttft_s,
        "full_ttft_s": full_s,
        "speedup": full_s / ttft_s,
        "best_ratio": best,
        "best_ttft_s": swept[best],
        "over_best": ttft_s / swept[best],
        "prefilled": all(one.prefilled for one in found.race.asked[found.cell]),
        "sweep": [{"ratio": ratio, "ttft_s": seconds} for ratio, seconds in swept.items()],
    }


def _fidelity(fidelity: Fidelity, kind: str, cell: Cell) -> Row:
    judged = fidelity.get((kind, cell.method.name, cell.ratio))
    none = fidelity.get((kind, cell.method.name, 0.0))
    if judged is None:
        return {"kl": None, "kl_most": None, "top1": None, "closed": None}
    closed = 1 - judged.kl / none.kl if none is not None and none.kl > 0 else None
    return {"kl": judged.kl, "kl_most": judged.kl_most, "top1": judged.top1, "closed": closed}


def _times(asked: Sequence[Asked], full_s: Sequence[float]) -> Row:
    times_s = [one.ttft_s for one in asked]
    ttft_s, full_ttft_s = statistics.median(times_s), statistics.median(full_s)
    # These values come from one run, the one nearest to the median, so that they are consistent with each other.
    typical = min(asked, key=lambda one: abs(one.ttft_s - ttft_s))
    return {
        "ttft_s": ttft_s,
        "ttft_min_s": min(times_s),
        "ttft_max_s": max(times_s),
        "full_ttft_s": full_ttft_s,
        "full_ttft_min_s": min(full_s),
        "full_ttft_max_s": max(full_s),
        "speedup": full_ttft_s / ttft_s,
        "repeats": len(times_s),
        "bytes": typical.received_bytes,
        "receive_s": typical.receive_s,
        "exact_tokens": typical.exact_tokens,
        "approximate_tokens": typical.approximate_tokens,
        "recomputed_tokens": typical.recomputed_tokens,
        "prefilled": sum(one.prefilled for one in asked) * 2 > len(asked),
    }


def _throughput(cell: Cell, batches: Batches | None) -> Mapping[str, float | None]:
    """Throughput with and without reuse. None where it was not measured."""
    found = batches.of.get(cell) if batches is not None else None
    full = batches.full if batches is not None and found is not None else None
    return {"throughput_tok_s": found, "full_throughput_tok_s": full}


def _median(asked: Sequence[Asked]) -> float:
    return statistics.median(one.ttft_s for one in asked)
