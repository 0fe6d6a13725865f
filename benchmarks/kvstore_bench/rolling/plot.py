"""Plots the fetches of clients over time, and what was restarted meanwhile."""

from collections.abc import Sequence
from pathlib import Path

from kvstore_bench.rolling.load import Fetch

_FOUND, _MISSING = "#1F77B4", "#D62728"


def plot_fetches(fetches: Sequence[Fetch], path: Path) -> None:
    """Writes a PNG with a dot for each fetch: when it began, and how long it took. Those that missed pages are red."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, panel = plt.subplots(figsize=(12, 5))
    start_s = fetches[0].began_s
    for label, colour, chosen in (
        ("all pages found", _FOUND, [fetch for fetch in fetches if not fetch.missing]),
        ("some pages missing", _MISSING, [fetch for fetch in fetches if fetch.missing]),
    ):
        times_s = [fetch.began_s - start_s for fetch in chosen]
        panel.scatter(
            times_s,
            [1000 * fetch.seconds for fetch in chosen],
            s=4,
            color=colour,
            label=f"{label}: {len(chosen)}",
        )
    for number, phase in enumerate(dict.fromkeys(fetch.phase for fetch in fetches if fetch.phase)):
        began_s = next(fetch.began_s for fetch in fetches if fetch.phase == phase) - start_s
        panel.axvline(began_s, color="#7F7F7F", linewidth=0.8)
        height = 0.98 - 0.05 * (number % 2)
        panel.text(began_s, height, f" {phase}", transform=panel.get_xaxis_transform(), fontsize=7, va="top")
    panel.set(yscale="log", xlabel="seconds", ylabel="milliseconds of a fetch of 8 pages")
    panel.legend(loc="lower right", markerscale=3)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
