"""Plots `kvstore bench reprefill`: time to first token per disk, and KL, over the budget."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def plot_reprefill(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Writes the plot. Systems without a budget are horizontal lines."""
    from matplotlib.figure import Figure

    disks = list(dict.fromkeys(row["disk"] for row in rows))
    names = list(dict.fromkeys(row["system"] for row in rows))
    figure = Figure(figsize=(3.6 * (len(disks) + 1) + 1.4, 3.8), layout="constrained")
    drawn = figure.subplots(1, len(disks) + 1, squeeze=False)[0]
    for axes, disk in zip(drawn, disks, strict=False):
        axes.set_title(f"time to first token, s, {disk}", fontsize=10)
        axes.set_yscale("log")
        for number, name in enumerate(names):
            _line(axes, [r for r in rows if (r["disk"], r["system"]) == (disk, name)], "ttft_s", name, number)
    drawn[-1].set_title("KL", fontsize=10)
    for number, name in enumerate(names):
        chosen = [row for row in rows if (row["disk"], row["system"]) == (disks[0], name)]
        if chosen[0]["budget"] is not None:
            _line(drawn[-1], chosen, "kl", name, number)
    for axes in drawn:
        axes.set_xlabel("budget")
        axes.grid(visible=True, alpha=0.2)
    handles, labels = drawn[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", fontsize=8)
    figure.savefig(path, dpi=150)


def _line(axes: Any, rows: Sequence[Mapping[str, Any]], field: str, name: str, number: int) -> None:
    if rows[0]["budget"] is None:
        axes.axhline(rows[0][field], color=f"C{number}", linestyle="--", label=name)
    else:
        axes.plot([r["budget"] for r in rows], [r[field] for r in rows], "o-", color=f"C{number}", label=name)
