"""Plots `kvstore bench reprefill`: time to first token on each disk, and KL, by budget."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_Rows = Sequence[Mapping[str, Any]]


def plot_reprefill(rows: _Rows, path: Path) -> None:
    """Writes the plot. Systems without a budget are horizontal lines; where there is one budget, all are bars."""
    from matplotlib.figure import Figure

    disks = list(dict.fromkeys(row["disk"] for row in rows))
    names = list(dict.fromkeys(row["system"] for row in rows))
    budgets = {row["budget"] for row in rows} - {None}
    height = 3.8 if len(budgets) > 1 else 1.6 + 0.28 * len(names)
    figure = Figure(figsize=(3.6 * (len(disks) + 1) + 1.4, height), layout="constrained")
    drawn = figure.subplots(1, len(disks) + 1, squeeze=False)[0]
    for axes, disk in zip(drawn, disks, strict=False):
        rate = next(row["disk_bandwidth_Bps"] for row in rows if row["disk"] == disk)
        speed = "" if rate is None else f" ({rate / 1e6:.0f} MB/s)"
        axes.set_title(f"time to first token, s\n{disk}{speed}", fontsize=10)
        _draw(axes, [row for row in rows if row["disk"] == disk], "ttft_s", names, budgets)
    first = {(row["system"], row["budget"]): row for row in reversed(rows) if row["budget"] is not None}
    drawn[-1].set_title("KL, nats a token", fontsize=10)
    _draw(drawn[-1], list(first.values()), "kl", names, budgets)
    if len(budgets) > 1:
        handles, labels = drawn[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside right center", fontsize=8)
    figure.savefig(path, dpi=150)


def _draw(axes: Any, rows: _Rows, field: str, names: Sequence[str], budgets: set[float]) -> None:
    axes.grid(visible=True, alpha=0.2)
    if len(budgets) > 1:
        axes.set_xlabel("budget")
        if field == "ttft_s":
            axes.set_yscale("log")
        for number, name in enumerate(names):
            _line(axes, [row for row in rows if row["system"] == name], field, name, number)
        return
    found = {row["system"]: row[field] for row in rows if row[field] is not None}
    shown = [name for name in names if name in found]
    bars = axes.barh(
        shown, [found[name] for name in shown], color=[f"C{names.index(name)}" for name in shown]
    )
    axes.bar_label(bars, fmt="%.3g", fontsize=7, padding=2)
    axes.invert_yaxis()
    axes.tick_params(axis="y", labelsize=8)
    axes.margins(x=0.15)


def _line(axes: Any, rows: _Rows, field: str, name: str, number: int) -> None:
    if not rows or rows[0][field] is None:
        return
    if rows[0]["budget"] is None:
        axes.axhline(rows[0][field], color=f"C{number}", linestyle="--", label=name)
    else:
        axes.plot([r["budget"] for r in rows], [r[field] for r in rows], "o-", color=f"C{number}", label=name)
