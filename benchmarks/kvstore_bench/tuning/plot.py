"""Plots seconds to the first token over the recompute ratio, for each tier: the search and the sweep."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def plot_ratios(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.6 * len(rows) + 0.6, 3.6), layout="constrained")
    for axes, row in zip(figure.subplots(1, len(rows), squeeze=False)[0], rows, strict=True):
        if row["sweep"]:
            axes.plot(*zip(*row["sweep"], strict=True), color="C0", marker="o", markersize=3, label="sweep")
        axes.plot(*zip(*row["measured"], strict=True), "x", color="0.4", label="search")
        axes.plot([row["ratio"]], [row["ttft_s"]], "*", color="C3", markersize=12, label="tuned")
        axes.axvline(row["first_ratio"], color="0.7", linestyle=":", label="first ratio")
        axes.axhline(row["full_ttft_s"], color="0.4", linestyle="--", label="full recompute")
        axes.set_title(f"{row['tier']}: {row['ratio']:.2f}", fontsize=10)
        axes.set_xlabel("recompute ratio")
        axes.set_ylim(bottom=0)
        axes.grid(visible=True, alpha=0.2)
    axes.legend(fontsize=8)
    figure.axes[0].set_ylabel("seconds to the first token")
    figure.savefig(path, dpi=150)
