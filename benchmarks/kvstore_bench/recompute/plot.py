"""Plots `kvstore bench recompute`: KL over the ratio per kind of prompt, and time to first token over the ratio per
tier."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kvstore_bench.recompute.methods import OURS

_COLORS = ("C0", "C1", "C2", "C4", "C5", "C6", "C8", "C9", "C7")


def plot_recompute(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Writes the plot. Omits tuned ratios, because they were measured in other rounds."""
    from matplotlib.figure import Figure

    rows = [row for row in rows if not row["tuned"]]
    kinds = list(dict.fromkeys(row["kind"] for row in rows))
    tiers = list(dict.fromkeys(row["tier"] for row in rows))
    names = list(dict.fromkeys(row["selector"] for row in rows))
    styles: dict[str, dict[str, Any]] = {
        name: {"color": color} for name, color in zip(names, _COLORS, strict=False)
    }
    styles[OURS] = {"color": "C3", "linewidth": 2.5}
    figure = Figure(figsize=(3.8 * (len(kinds) + len(tiers)) + 1.6, 4.0), layout="constrained")
    drawn = figure.subplots(1, len(kinds) + len(tiers), squeeze=False)[0]
    for axes, kind in zip(drawn, kinds, strict=False):
        chosen = [row for row in rows if (row["kind"], row["tier"]) == (kind, tiers[0])]
        axes.set_title(f"KL, {kind}", fontsize=10)
        for name in names:
            _line(
                axes,
                [row for row in chosen if row["selector"] == name and row["kl"] is not None],
                "kl",
                styles,
            )
        axes.set_ylim(bottom=0)
    for axes, tier in zip(drawn[len(kinds) :], tiers, strict=True):
        chosen = [row for row in rows if (row["kind"], row["tier"]) == (kinds[0], tier)]
        axes.set_title(f"time to first token, s, {tier}", fontsize=10)
        for name in names:
            _line(axes, [row for row in chosen if row["selector"] == name], "ttft_s", styles)
        axes.axhline(chosen[0]["full_ttft_s"], color="0.4", linestyle="--", label="full recompute")
        axes.set_ylim(bottom=0)
    for axes in drawn:
        axes.set_xlabel("recompute ratio")
        axes.grid(visible=True, alpha=0.2)
    handles, labels = drawn[-1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", fontsize=8)
    figure.savefig(path, dpi=150)


def _line(
    axes: Any, rows: Sequence[Mapping[str, Any]], field: str, styles: Mapping[str, dict[str, Any]]
) -> None:
    points = sorted((row["ratio"], row[field]) for row in rows)
    if points:
        name = rows[0]["selector"]
        ratios, values = zip(*points, strict=True)
        axes.plot(ratios, values, marker="o", markersize=3, label=name, **styles[name])
