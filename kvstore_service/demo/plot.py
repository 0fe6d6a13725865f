"""The picture of the demo: one timeline for each path, on one axis."""

from collections.abc import Sequence
from pathlib import Path

from kvstore_service.demo.worker import Run

_STAGES = ("receive", "decode", "restore", "compute")
_COLOURS = {"receive": "#4C78A8", "decode": "#F58518", "restore": "#54A24B", "compute": "#B279A2"}


def plot_timelines(runs: Sequence[Run], bandwidth: str, path: Path) -> None:
    """Draw when each stage worked until the first token, one panel a run."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(len(runs), 1, sharex=True, figsize=(9, 1.9 * len(runs) + 0.6))
    for panel, run in zip(panels, runs, strict=True):
        for row, stage in enumerate(_STAGES):
            bars = [(start, end - start) for start, end in _busy(run, stage)]
            panel.broken_barh(bars, (row - 0.4, 0.8), facecolors=_COLOURS[stage])
        panel.axvline(run.ttft_s, color="black", linewidth=1, linestyle="--")
        panel.set_yticks(range(len(_STAGES)), _STAGES)
        panel.set_ylim(len(_STAGES) - 0.1, -0.6)
        panel.set_title(
            f"full prefill of {run.prompt_tokens} tokens"
            if run.path == "cold"
            else f"{run.tokens_reused} of {run.prompt_tokens} tokens reused as {run.encoding} over {bandwidth}",
            loc="left",
            fontsize=10,
        )
        panel.set_title(f"first token after {run.ttft_s:.2f} s", loc="right", fontsize=10)
        for side in ("top", "right"):
            panel.spines[side].set_visible(False)
    panels[-1].set_xlabel("seconds since the question")
    panels[-1].set_xlim(0, 1.05 * max(run.ttft_s for run in runs))
    figure.tight_layout()
    figure.savefig(path, dpi=140)
    plt.close(figure)


def _busy(run: Run, stage: str) -> list[tuple[float, float]]:
    """When a stage worked, up to the first token. The engine computes whenever it does not wait for a layer."""
    spans = [
        (s.start_s, min(s.end_s, run.ttft_s))
        for s in run.spans
        if s.stage == stage and s.start_s < run.ttft_s
    ]
    if stage != "compute":
        return spans
    waits = sorted((s.start_s, s.end_s) for s in run.spans if s.stage == "wait")
    pieces: list[tuple[float, float]] = []
    for begin, end in spans:
        for wait_begin, wait_end in waits:
            if begin < wait_begin < end:
                pieces.append((begin, wait_begin))
            begin = max(begin, min(wait_end, end))
        pieces.append((begin, end))
    return pieces
