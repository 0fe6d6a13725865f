"""Plots requests: when each stage worked until the first token. One panel per request, with a common time axis."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kvstore_client.spans import STAGES, Stage
from kvstore_client.timeline import Timeline

_COLOURS: dict[Stage, str] = {
    "lookup": "#9D755D",
    "plan": "#E45756",
    "receive": "#4C78A8",
    "decode": "#F58518",
    "restore": "#54A24B",
    "compute": "#B279A2",
}
"""Stages in the plot. Waiting appears as a gap in the compute stage."""
_NARROWEST = 0.001
"""Smallest width of a bar, as a share of the axis, so that short work stays visible."""


@dataclass(frozen=True, slots=True)
class TracedRun:
    """One request in the plot."""

    name: str
    timeline: Timeline
    ttft_s: float
    """Time of the first token on the timeline. Later work is not drawn."""


def plot_timelines(runs: Sequence[TracedRun], title: str, path: Path) -> None:
    """Draws the requests below each other. An empty `title` is not drawn. Raises ImportError without matplotlib."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    end_s = 1.05 * max(run.ttft_s for run in runs)
    drawn = {span.stage for run in runs for span in run.timeline.spans}
    rows = [stage for stage in STAGES if stage in drawn and stage in _COLOURS]
    figure, panels = plt.subplots(
        len(runs), 1, sharex=True, squeeze=False, figsize=(9, (0.9 + 0.25 * len(rows)) * len(runs) + 0.6)
    )
    for panel, run in zip(panels[:, 0], runs, strict=True):
        for row, stage in enumerate(rows):
            bars = [
                (start_s, max(stop_s - start_s, _NARROWEST * end_s)) for start_s, stop_s in _bars(run, stage)
            ]
            # The colour is darker where several threads of a stage worked at the same time.
            panel.broken_barh(bars, (row - 0.4, 0.8), facecolors=_COLOURS[stage], alpha=0.7, linewidth=0)
        for mark in run.timeline.marks:
            if mark.at_s <= run.ttft_s:
                panel.axvline(mark.at_s, color="dimgrey", linewidth=0.8, linestyle=":")
                words = f"{mark.name} {mark.label}".strip()
                panel.text(mark.at_s, -0.6, f" {words}", fontsize=6, color="dimgrey", va="top")
        panel.axvline(run.ttft_s, color="black", linewidth=1, linestyle="--")
        panel.set_yticks(range(len(rows)), rows)
        panel.set_ylim(len(rows) - 0.1, -0.6)
        panel.set_title(run.name, loc="left", fontsize=10)
        panel.set_title(f"first token after {run.ttft_s:.2f} s", loc="right", fontsize=10)
        for side in ("top", "right"):
            panel.spines[side].set_visible(False)
    panels[-1, 0].set_xlabel("seconds since the question")
    panels[-1, 0].set_xlim(0, end_s)
    figure.suptitle(title or None, fontsize=11)
    figure.tight_layout()
    figure.savefig(path, dpi=140)
    plt.close(figure)


def _bars(run: TracedRun, stage: Stage) -> list[tuple[float, float]]:
    if stage == "compute":  # one span holds the waits of all layers
        return run.timeline.busy(stage, run.ttft_s)
    return [
        (span.start_s, min(span.end_s, run.ttft_s))
        for span in run.timeline.spans
        if span.stage == stage and span.start_s < run.ttft_s
    ]
