"""Plots `kvstore bench link`: time to first token over bandwidth, one panel per document length and jitter."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_STYLES: dict[str, dict[str, Any]] = {
    "cold": {"color": "0.4", "linestyle": "--"},
    "raw": {"color": "0.4", "linestyle": ":"},
    "cachegen": {"color": "C1"},
    "kvfetcher": {"color": "C4"},
    "adaptive": {"color": "C3", "linewidth": 2.5},
}
_OTHERS = ("C0", "C2", "C5", "C6", "C8", "C9", "C7")


def plot_link(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Writes the plot. The shaded area is between the quartiles."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    panels = list(dict.fromkeys((row["tokens"], row["jitter"]) for row in rows))
    names = list(dict.fromkeys(row["policy"] for row in rows))
    others = [name for name in names if name not in _STYLES]
    styles = {name: {"color": _OTHERS[i % len(_OTHERS)]} for i, name in enumerate(others)} | _STYLES
    figure = Figure(figsize=(4.8 * len(panels) + 2.2, 4.4), layout="constrained")
    drawn = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, (tokens, jitter) in zip(drawn, panels, strict=True):
        axes.set_title(f"{tokens} tokens" + ("" if jitter == "none" else f", {jitter}"), fontsize=10)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.grid(visible=True, which="both", alpha=0.2)
        for name in names:
            points = [r for r in rows if (r["tokens"], r["jitter"], r["policy"]) == (tokens, jitter, name)]
            points.sort(key=lambda row: row["bandwidth_bps"])
            rates = [row["bandwidth_bps"] / 1e6 for row in points]
            axes.plot(
                rates, [r["ttft_s"] for r in points], marker="o", markersize=3, label=name, **styles[name]
            )
            axes.fill_between(
                rates,
                [r["ttft_q1_s"] for r in points],
                [r["ttft_q3_s"] for r in points],
                alpha=0.12,
                color=styles[name]["color"],
            )
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axis.set_minor_formatter(NullFormatter())
        axes.set_xlabel("Mbit/s")
    drawn[0].set_ylabel("time to first token, s")
    handles, labels = drawn[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", fontsize=8)
    figure.savefig(path, dpi=150)
