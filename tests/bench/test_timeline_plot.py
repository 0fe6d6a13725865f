"""The picture of requests."""

from pathlib import Path

import numpy as np
import pytest

from kvstore_bench.timeline_plot import TracedRun, plot_timelines
from kvstore_client.timeline import Timeline

pytest.importorskip("matplotlib")


def traced(name: str) -> TracedRun:
    timeline = Timeline()
    timeline.add("compute", 0.0, 1.0)
    timeline.add("wait", 0.2, 0.4)
    for chunk in range(8):
        timeline.add("receive", 0.1 * chunk, 0.1 * chunk + 0.08, chunk=chunk)
    timeline.mark("replan", "slower", bandwidth_Bps=1e6)
    return TracedRun(name, timeline, 0.9)


def picture(runs: list[TracedRun], path: Path) -> np.ndarray:
    from matplotlib import pyplot as plt

    plot_timelines(runs, "two requests", path)
    return np.asarray(plt.imread(path))


def test_requests_are_drawn_below_each_other(tmp_path: Path) -> None:
    one = picture([traced("first")], tmp_path / "one.png")
    two = picture([traced("first"), traced("second")], tmp_path / "two.png")
    assert two.shape[0] > 1.5 * one.shape[0]
    assert two.shape[1] == one.shape[1]
    blue = np.array([0x4C, 0x78, 0xA8]) / 255 * 0.7 + 0.3  # receive, over white
    assert (np.abs(one[..., :3] - blue).max(axis=-1) < 0.02).sum() > 1000
