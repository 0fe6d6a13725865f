"""From what was measured to rows, targets and a picture."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from kvstore_bench.recompute.engine import Asked
from kvstore_bench.recompute.fidelity import Fidelity, Judged, divergence
from kvstore_bench.recompute.methods import Cell, cells_of, methods_named
from kvstore_bench.recompute.plot import plot_recompute
from kvstore_bench.recompute.rows import rows_of, tuned_row
from kvstore_bench.recompute.targets import targets
from kvstore_bench.recompute.tiers import tiers_named
from kvstore_bench.recompute.times import Batches, Race
from kvstore_bench.recompute.tuning import TunedTier
from kvstore_codec.errors import ConfigurationError

FOCUS, HKVD = methods_named(["focus", "hkvd"])
CELLS = cells_of([FOCUS, HKVD], [0.0, 0.15, 1.0])


def asked(ttft_s: float, received_bytes: int = 1000) -> Asked:
    return Asked(ttft_s, received_bytes, 0.01, 512, 2560, 384)


def judged(kl: float) -> Judged:
    return Judged(kl, 2 * kl, 0.9)


def fidelity(focus: float = 0.01, hkvd: float = 0.03, everything: float = 1e-7) -> Fidelity:
    found = {}
    for kind in ("text", "documents"):
        for name, kl in (("focus", focus), ("hkvd", hkvd)):
            found[kind, name, 0.0] = judged(0.05)
            found[kind, name, 0.15] = judged(kl)
            found[kind, name, 1.0] = judged(everything)
    return found


def rows(
    tier: str = "dram", *, focus_s: float = 1.0, tokens: int = 3072, **kls: float
) -> list[dict[str, Any]]:
    race = Race({cell: [asked(focus_s if cell.method is FOCUS else 2.0)] for cell in CELLS}, [3.0, 5.0, 4.0])
    batches = Batches({cell: 4000.0 for cell in CELLS if cell.ratio == 0.15}, 1000.0)
    return list(rows_of(tier, race, batches, fidelity(**kls), tokens))


def tuned(tier: str, ttft_s: float, best_s: float) -> dict[str, Any]:
    cells = (Cell(FOCUS, 0.17), Cell(FOCUS, 0.15), Cell(FOCUS, 1.0))
    race = Race(
        dict(zip(cells, ([asked(ttft_s)], [asked(best_s)], [asked(9.0)]), strict=True)), [4.0, 4.0, 8.0]
    )
    return tuned_row(tier, TunedTier(cells[0], 0.2, 9, cells[1:], race), 3072)


def met(found: list[dict[str, Any]]) -> dict[tuple[str, str], str]:
    return {(goal["target"], goal["where"]): goal["met"] for goal in found}


def test_a_row_for_each_kind_and_cell() -> None:
    found = rows()
    assert len(found) == 2 * len(CELLS)
    row = next(r for r in found if (r["kind"], r["selector"], r["ratio"]) == ("documents", "focus", 0.15))
    assert row["kl"] == 0.01
    assert row["closed"] == pytest.approx(0.8)
    assert (row["ttft_s"], row["full_ttft_s"], row["full_ttft_min_s"], row["speedup"]) == (1.0, 4.0, 3.0, 4.0)
    assert (row["throughput_tok_s"], row["full_throughput_tok_s"]) == (4000.0, 1000.0)
    assert (row["bytes"], row["tier"], row["tokens"], row["repeats"]) == (1000, "dram", 3072, 1)
    others = [r for r in found if r["ratio"] != 0.15]
    assert all(r["throughput_tok_s"] is r["full_throughput_tok_s"] is None for r in others)


def test_a_row_tells_the_run_nearest_to_the_median() -> None:
    cell = Cell(FOCUS, 0.15)
    race = Race({cell: [asked(9.0, 1), asked(1.0, 2), asked(2.0, 3)]}, [4.0])
    row = next(rows_of("dram", race, None, fidelity(), 3072))
    assert (row["ttft_s"], row["ttft_min_s"], row["ttft_max_s"], row["bytes"]) == (2.0, 1.0, 9.0, 3)


def test_a_ratio_that_was_not_judged_has_no_kl() -> None:
    cell = Cell(FOCUS, 0.2)
    row = next(
        rows_of("ssd", Race({cell: [asked(1.0)]}, [4.0]), None, fidelity(), 3072, tuned=True, only=[cell])
    )
    assert (row["kl"], row["closed"], row["tuned"]) == (None, None, True)


def test_a_tuned_ratio_that_is_in_the_sweep_is_as_good_as_itself() -> None:
    cells = (Cell(FOCUS, 0.15), Cell(FOCUS, 1.0))
    race = Race({cells[0]: [asked(1.0)], cells[1]: [asked(3.0)]}, [4.0])
    row = tuned_row("ssd", TunedTier(cells[0], 0.15, 9, cells, race), 3072)
    assert (row["over_best"], row["best_ratio"], row["speedup"]) == (1.0, 0.15, 4.0)
    assert row["sweep"] == [{"ratio": 0.15, "ttft_s": 1.0}, {"ratio": 1.0, "ttft_s": 3.0}]


def test_targets_say_what_was_met() -> None:
    found = met(targets(rows(), [tuned("dram", 1.0, 1.0), tuned("ssd", 1.6, 1.0)]))
    for kind in ("text", "documents"):
        assert found["share of the KL gap closed", f"{kind}, ratio 0.15"] == "met"
        assert found["KL, focus / hkvd", f"{kind}, ratio 0.15"] == "met"
        assert found["KL of ratio 1", kind] == "met"
    assert found["full / reused", "dram, 3072 tokens, ratio 0.15"] == "met"
    assert found["throughput, reused / full", "dram, 3072 tokens, ratio 0.15"] == "met"
    assert found["tuned / best of sweep", "dram, ratio 0.17"] == "met"
    assert found["tuned / best of sweep", "ssd, ratio 0.17"] == "missed"
    assert found["full / reused, tuned ratio", "ssd, ratio 0.17"] == "met"
    assert ("full / reused, tuned ratio", "dram, ratio 0.17") not in found


def test_targets_say_what_was_missed() -> None:
    found = met(targets(rows(focus_s=2.0, focus=0.03, everything=1e-3), [tuned("hdd", 2.0, 2.0)]))
    assert set(found.values()) == {"missed", "met"}
    assert found["share of the KL gap closed", "text, ratio 0.15"] == "missed"
    assert found["KL, focus / hkvd", "text, ratio 0.15"] == "missed"  # as good is not ahead
    assert found["KL of ratio 1", "documents"] == "missed"
    assert found["full / reused", "dram, 3072 tokens, ratio 0.15"] == "missed"
    assert found["full / reused, tuned ratio", "hdd, ratio 0.17"] == "missed"


def test_short_prompts_say_nothing_of_times() -> None:
    found = met(targets(rows(tokens=1024), []))
    assert not [target for target, _ in found if target.startswith(("full", "throughput"))]


def test_divergence() -> None:
    even = torch.tensor([[0.5, 0.5]]).log()
    skewed = torch.tensor([[0.75, 0.25]]).log()
    assert divergence(even, even) == (0.0, 1.0)
    kl, _ = divergence(even, skewed)
    assert kl == pytest.approx(0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25))
    assert divergence(skewed, torch.tensor([[0.25, 0.75]]).log())[1] == 0.0


def test_only_ours_has_drift() -> None:
    drifting = [m.name for m in methods_named(["focus", "focus-nodrift", "query", "hkvd"]) if m.drift]
    assert drifting == ["focus"]
    assert Cell(HKVD, 0.15).recompute.drift is False
    for name in ("best", "hkvd-nodrift", ""):
        with pytest.raises(ConfigurationError):
            methods_named([name])
    with pytest.raises(ConfigurationError, match="between 0 and 1"):
        cells_of([FOCUS], [1.5])


def test_tiers_are_measured_from_the_fastest_on() -> None:
    assert [tier.name for tier in tiers_named(["hdd", "dram"])] == ["dram", "hdd"]
    with pytest.raises(ConfigurationError, match="no tier"):
        tiers_named(["tape"])


def test_a_picture(tmp_path: Path) -> None:
    plot_recompute([*rows(), *rows("ssd")], tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
