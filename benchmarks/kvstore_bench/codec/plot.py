"""Plots rate and distortion of every method."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Row = Mapping[str, Any]

_MARKERS = {"kvstore": "o", "min/max": "s", "CacheGen": "^"}
_COLOURS = {
    "klt_frames, pco": "#D62728",
    "klt_frames, zstd": "#FF9896",
    "klt_frames, hevc-cpu": "#9467BD",
    "token_frames, zstd": "#98DF8A",
    "token_frames, hevc-cpu": "#2CA02C",
    "min/max, zstd": "#AEC7E8",
    "min/max, hevc-cpu": "#1F77B4",
    "CacheGen, 256-token chunks": "#000000",
    "CacheGen, 1,024-token chunks": "#7F7F7F",
    "CacheGen default, 256-token chunks": "#E377C2",
    "CacheGen default, 1,024-token chunks": "#F7B6D2",
}
_OTHER_COLOURS = ("#8C564B", "#BCBD22", "#17BECF", "#FF7F0E")
_TICKS = (0.125, 0.25, 0.5, 1, 2, 4, 8, 16)


@dataclass(frozen=True, slots=True)
class Curve:
    """One line of the plot."""

    label: str
    method: str
    points: tuple[tuple[float, float, str], ...]
    """(bits per value, KL, rate), by descending bits"""
    colour: str
    dashed: bool = False


def curves(rows: Sequence[Row]) -> list[Curve]:
    """One curve per layout and coder, each with its usual frame size. Exact encodings are left out."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if row["kl"] > 0 and "@" not in row["name"].removesuffix("@1024"):
            groups.setdefault((row["method"], _label(row)), []).append(row)
    return [
        curve
        for index, ((method, label), group) in enumerate(groups.items())
        for curve in _of_group(method, label, group, _OTHER_COLOURS[index % len(_OTHER_COLOURS)])
    ]


def plot_rate_distortion(rows: Sequence[Row], title: str, path: Path) -> None:
    """Writes a PNG of the KL divergence over bits per value, both logarithmic."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, panel = plt.subplots(figsize=(10, 5.6))
    drawn = curves(rows)
    for curve in drawn:
        bits, divergence, rates = zip(*curve.points, strict=True)
        panel.plot(
            bits,
            divergence,
            marker=_MARKERS[curve.method],
            markersize=5,
            linewidth=1.5,
            linestyle="--" if curve.dashed else "-",
            color=curve.colour,
            alpha=0.6 if curve.dashed else 1,
            label=curve.label,
        )
        if curve.label == "klt_frames, pco":
            for x, y, rate in zip(bits, divergence, rates, strict=True):
                panel.annotate(
                    rate, (x, y), (-6, -4), textcoords="offset points", ha="right", va="top", fontsize=9
                )
    panel.set_xscale("log")
    panel.set_yscale("log")
    points = [bits for curve in drawn for bits, _, _ in curve.points]
    if points:
        panel.set_xlim(min(points) / 1.4, max(points) * 1.25)
        ticks = [tick for tick in _TICKS if min(points) / 1.4 <= tick <= max(points) * 1.25]
        panel.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        panel.set_xticks([], minor=True)
    panel.set_xlabel("bits per value of K and V, all stored bytes (bf16: 16)")
    panel.set_ylabel("KL divergence from exact KV, nats per token")
    panel.set_title(title, loc="left", fontsize=11)
    panel.grid(visible=True, which="major", alpha=0.3)
    for side in ("top", "right"):
        panel.spines[side].set_visible(False)
    if drawn:
        panel.legend(loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False, fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=140, bbox_inches="tight")
    plt.close(figure)


def _label(row: Row) -> str:
    if row["method"] == "CacheGen":
        # CacheGen's default uses different bins per layer, so it is not a point of the curve over one number of bins.
        name = "CacheGen default" if row["rate"] == "default" else "CacheGen"
        return f"{name}, {row['frame_tokens']:,}-token chunks"
    family = "min/max" if row["method"] == "min/max" else row["layout"]
    return f"{family}, {row['coder']}"


def _of_group(method: str, label: str, group: Sequence[Row], other: str) -> Iterator[Curve]:
    colour = _COLOURS.get(label, other)
    yield Curve(label, method, _points(group, "bits_per_value"), colour)
    if len(group) > 1 and all(row["payload_bits_per_value"] is not None for row in group):
        without = _points(group, "payload_bits_per_value")
        yield Curve(f"{label}, payload only", method, without, colour, dashed=True)


def _points(group: Sequence[Row], bits: str) -> tuple[tuple[float, float, str], ...]:
    return tuple(sorted(((row[bits], row["kl"], row["rate"]) for row in group), reverse=True))
