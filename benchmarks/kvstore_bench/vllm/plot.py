"""Seconds to the first token over the bandwidth of the link, a panel for each length of prompt."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_STYLES: dict[str, dict[str, Any]] = {
    "cold": {"color": "0.4", "linestyle": "--"},
    "exact": {"color": "C0"},
    "adaptive": {"color": "C3", "linewidth": 2.5},
    "lmcache-raw": {"color": "C1", "linestyle": ":"},
    "lmcache-fp8": {"color": "C1"},
}
_UNSHAPED_MBIT = 10_000
"""Where the unshaped link is drawn."""


def plot_vllm(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draws medians, with the range between the quartiles shaded. Rows without a time are left out. Without any
    time, no file is written."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter, NullLocator

    drawn = [row for row in rows if row.get("ttft_s") is not None]
    if not drawn:
        return
    lengths = list(dict.fromkeys(row["prompt_tokens"] for row in drawn))
    places = sorted({_place(row) for row in drawn})
    figure = Figure(figsize=(4.8 * len(lengths) + 2.0, 4.4), layout="constrained")
    panels = figure.subplots(1, len(lengths), squeeze=False)[0]
    for axes, tokens in zip(panels, lengths, strict=True):
        axes.set_title(f"{tokens} tokens", fontsize=10)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.grid(visible=True, which="both", alpha=0.2)
        for name in dict.fromkeys(row["policy"] for row in drawn):
            points = [row for row in drawn if (row["prompt_tokens"], row["policy"]) == (tokens, name)]
            points.sort(key=_place)
            where, style = [_place(row) for row in points], _STYLES.get(name, {})
            (line,) = axes.plot(
                where, [row["ttft_s"] for row in points], marker="o", markersize=3, label=name, **style
            )
            lower, upper = ([row[f"ttft_{quartile}_s"] for row in points] for quartile in ("q1", "q3"))
            axes.fill_between(where, lower, upper, alpha=0.12, color=line.get_color())
        axes.xaxis.set_major_locator(FixedLocator(places))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(
            FuncFormatter(lambda value, _: "unshaped" if value == _UNSHAPED_MBIT else f"{value:g}")
        )
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel("link between engine and store, Mbit/s")
    panels[0].set_ylabel("seconds to the first token")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", fontsize=8)
    figure.savefig(path, dpi=150)


def _place(row: Mapping[str, Any]) -> float:
    return _UNSHAPED_MBIT if row["bandwidth_bps"] is None else row["bandwidth_bps"] / 1e6
