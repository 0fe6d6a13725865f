"""Plots every read over time, with the faults."""

from collections.abc import Sequence
from pathlib import Path

from kvstore_bench.faults.events import Event
from kvstore_bench.faults.inflict import Fault, Kind
from kvstore_bench.faults.rows import is_failure

_COLOURS = {
    Kind.STORAGE: "#D62728",
    Kind.RAYLET: "#9467BD",
    Kind.COORDINATOR: "#2CA02C",
    Kind.PARTITION: "#FF7F0E",
}


def plot_faults(events: Sequence[Event], faults: Sequence[Fault], title: str, path: Path) -> None:
    """Writes a plot. The suffix of `path` determines the format."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, panel = plt.subplots(figsize=(11, 5))
    gets = [event for event in events if event.operation == "get"]
    start_s = min(event.begin_s for event in events)
    labelled: set[Kind] = set()
    for fault in faults:
        label = None if fault.kind in labelled else fault.kind.value
        labelled.add(fault.kind)
        panel.axvspan(
            fault.at_s - start_s, fault.back_s - start_s, color=_COLOURS[fault.kind], alpha=0.3, label=label
        )
    for wanted, colour, label in ((False, "#1F77B4", "read"), (True, "black", "failed read")):
        chosen = [get for get in gets if is_failure(get, faults) is wanted]
        if chosen:
            times = [get.begin_s - start_s for get in chosen]
            panel.scatter(times, [get.seconds * 1e3 for get in chosen], s=6, c=colour, label=label)
    panel.set_yscale("log")
    panel.set_xlabel("seconds")
    panel.set_ylabel("time of a read (ms)")
    panel.set_title(title)
    panel.legend(loc="upper right", ncols=3, fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)
