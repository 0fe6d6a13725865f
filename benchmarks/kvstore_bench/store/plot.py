"""Plots `kvstore bench store`: GB/s over size, one panel per operation and number of clients."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_STYLES: dict[str, dict[str, Any]] = {
    "raw-tcp": {"color": "0.6", "linestyle": "--"},
    "kvstore": {"color": "C3", "linewidth": 2.5},
}


def plot_throughput(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Writes the plot. The shaded area is the range over all rounds."""
    from matplotlib.figure import Figure

    measured = [row for row in rows if row["op"] in ("get", "put")]
    clients = sorted({row["clients"] for row in measured})
    figure = Figure(figsize=(3.2 * len(clients) + 1.5, 6), layout="constrained")
    panels = figure.subplots(2, len(clients), sharex=True, sharey="row", squeeze=False)
    for line, op in enumerate(("get", "put")):
        for column, count in enumerate(clients):
            axes = panels[line][column]
            axes.set_title(f"{op}, {count} client{'s' if count > 1 else ''}", fontsize=10)
            axes.set_xscale("log", base=2)
            axes.grid(visible=True, alpha=0.3)
            chosen = [row for row in measured if row["op"] == op and row["clients"] == count]
            for system in dict.fromkeys(row["system"] for row in chosen):
                points = sorted((r for r in chosen if r["system"] == system), key=lambda r: r["size_bytes"])
                sizes = [row["size_bytes"] / 1024 for row in points]
                style = _STYLES.get(system, {})
                (drawn,) = axes.plot(
                    sizes, [row["GBps"] for row in points], marker="o", markersize=3, label=system, **style
                )
                axes.fill_between(
                    sizes,
                    [row["GBps_min"] for row in points],
                    [row["GBps_max"] for row in points],
                    alpha=0.12,
                    color=drawn.get_color(),
                )
            axes.set_ylim(bottom=0)
    for axes in panels[-1]:
        axes.set_xlabel("size of a value, KiB")
    for axes_of_row in panels:
        axes_of_row[0].set_ylabel("GB/s")
    panels[0][-1].legend(fontsize=8)
    figure.savefig(path, dpi=150)
