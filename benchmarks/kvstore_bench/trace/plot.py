"""Plots hit rate over capacity."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Row = Mapping[str, Any]

_COLOURS = {"lru": "#1F77B4", "s3-fifo": "#2CA02C", "value": "#D62728"}


def plot_hit_rates(rows: Sequence[Row], title: str, path: Path) -> None:
    """Writes a plot with one line per policy, and the optimum."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, panel = plt.subplots(figsize=(8, 4.6))
    optimal = {row["capacity_fraction"]: row["optimal_hit_rate"] for row in rows}
    _draw(panel, optimal, "optimal (knows the future)", "#7F7F7F", "--")
    for policy in dict.fromkeys(row["policy"] for row in rows):
        rates = {row["capacity_fraction"]: row["prefix_hit_rate"] for row in rows if row["policy"] == policy}
        _draw(panel, rates, policy, _COLOURS.get(policy), "-")
    fractions = sorted(optimal)
    panel.set_xscale("log")
    panel.set_xticks(fractions, [f"{100 * fraction:g} %" for fraction in fractions])
    panel.set_xticks([], minor=True)
    panel.set_ylim(bottom=0)
    panel.set_xlabel("capacity, share of the trace's distinct blocks")
    panel.set_ylabel("blocks reused with an unbroken prefix")
    panel.yaxis.set_major_formatter(mpl.ticker.PercentFormatter(1, decimals=0))
    panel.set_title(title, loc="left", fontsize=11)
    panel.grid(visible=True, which="major", alpha=0.3)
    for side in ("top", "right"):
        panel.spines[side].set_visible(False)
    panel.legend(frameon=False, fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=140, bbox_inches="tight")
    plt.close(figure)


def plot_through_nodes(rows: Sequence[Row], path: Path) -> None:
    """Writes a plot with one panel per workload on one node. Each policy has a solid line for clients that know texts,
    and a dotted one for clients that do not."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    workloads = list(dict.fromkeys(row["workload"] for row in rows))
    figure, panels = plt.subplots(1, len(workloads), figsize=(6 * len(workloads), 4.4), squeeze=False)
    for panel, workload in zip(panels[0], workloads, strict=True):
        one = [row for row in rows if row["workload"] == workload and row["nodes"] == 1]
        for column, label, colour in (
            ("optimal_hit_rate", "optimal (knows the future)", "#7F7F7F"),
            ("beginnings_hit_rate", "keeps beginnings (oracle)", "#000000"),
        ):
            _draw(panel, {row["capacity_fraction"]: row[column] for row in one}, label, colour, "--")
        for policy, clients in dict.fromkeys((row["policy"], row["clients"]) for row in one):
            rates = {
                row["capacity_fraction"]: row["prefix_hit_rate"]
                for row in one
                if (row["policy"], row["clients"]) == (policy, clients)
            }
            style = "-" if clients == "know texts" else ":"
            _draw(panel, rates, f"{policy}, clients {clients}", _COLOURS.get(policy), style)
        fractions = sorted({row["capacity_fraction"] for row in one})
        panel.set_xscale("log")
        panel.set_xticks(fractions, [f"{100 * fraction:g} %" for fraction in fractions])
        panel.set_xticks([], minor=True)
        panel.set_ylim(bottom=0)
        panel.set_xlabel("capacity, share of distinct blocks")
        panel.yaxis.set_major_formatter(mpl.ticker.PercentFormatter(1, decimals=0))
        panel.set_title(workload, loc="left", fontsize=11)
        panel.grid(visible=True, which="major", alpha=0.3)
    panels[0][0].set_ylabel("blocks reused with an unbroken prefix")
    panels[0][0].legend(frameon=False, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=140, bbox_inches="tight")
    plt.close(figure)


def _draw(panel: Any, rates: Mapping[float, float], label: str, colour: str | None, style: str) -> None:
    points = sorted(rates.items())
    panel.plot(*zip(*points, strict=True), style, marker="o", markersize=4, color=colour, label=label)
