"""Restart the pods of the Helm chart but Redis, one after the other, and let the cluster grow and shrink, under load.

python benchmarks/rolling_restart.py [--pages 800] [--readers 3] [--quick] [--json FILE] [--plot FILE]

The rendered pods run as processes of this machine, with TLS and tokens: Redis, Ray's head, the gateway, and three
storage nodes that keep each chunk on two disks. Storage pods are stopped as Kubernetes stops them, after the hook that
drains them. `--quick` restarts one storage node, and leaves out the growing and shrinking.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from kvstore_bench.pods.release import Release
from kvstore_bench.results import write_results
from kvstore_bench.rolling.load import Fetch, Load
from kvstore_bench.rolling.plot import plot_fetches

_STEADY_S = 10.0
_STORAGE = 3
_GROWN = 5


def values(storage: int) -> dict[str, Any]:
    """Values of the chart for small nodes."""
    disk = {"size": "512Mi", "volume": {"size": "600Mi"}}
    return {
        "storage": {"replicas": storage, "memory": "64Mi", "disk": disk},
        "chunks": {"replicas": 2, "durability": "durable"},
        "log": {"level": "info"},
    }


class Restarts:
    """The steps, each of which is a phase of the load."""

    def __init__(self, release: Release) -> None:
        self.release = release

    def restart(self, component: str, ordinal: int = 0) -> None:
        self.release.pod(component, ordinal).stop()
        self.release.start(component, ordinal).wait_until("readiness")

    def gateway_lost(self) -> None:
        self.release.pod("gateway").kill()
        self.release.start("gateway").wait_until("readiness")

    def grow(self) -> None:
        self.release.upgrade(values(_GROWN))
        for ordinal in range(_STORAGE, _GROWN):
            self.release.start("storage", ordinal).wait_until("readiness")

    def shrink(self) -> None:
        """As `helm upgrade` does: the job that drains, then the pods with the highest ordinals."""
        self.release.upgrade(values(_STORAGE))
        status, text = self.release.run("drain")
        if status:
            raise RuntimeError(f"the drain job failed: {text}")
        for ordinal in reversed(range(_STORAGE, _GROWN)):
            self.release.pod("storage", ordinal).stop()


def measure(
    folder: Path, pages: int, readers: int, *, quick: bool, steady_s: float = _STEADY_S, pause_s: float = 0.0
) -> tuple[list[dict[str, Any]], list[Fetch]]:
    """A row for each phase, and all fetches."""
    with Release(folder, values(_STORAGE)) as release:
        release.start_all()
        load = Load(release.client_settings(), pages=pages, readers=readers, pause_s=pause_s)
        restarts = Restarts(release)
        steps: list[tuple[str, Callable[[], object]]] = [("before", partial(time.sleep, steady_s))]
        steps += [
            (f"storage {ordinal} drained, restarted", partial(restarts.restart, "storage", ordinal))
            for ordinal in reversed(range(1 if quick else _STORAGE))
        ]
        steps += [
            (f"{component} restarted", partial(restarts.restart, component))
            for component in ("gateway", "head")
        ]
        if not quick:
            steps += [("gateway killed", restarts.gateway_lost)]
            steps += [
                (f"{_STORAGE} to {_GROWN} nodes", restarts.grow),
                (f"{_GROWN} to {_STORAGE} nodes", restarts.shrink),
            ]
        steps += [("after", partial(time.sleep, steady_s))]
        rows = []
        with load:
            for name, step in steps:
                print(name, file=sys.stderr)
                load.begin(name)
                step()
                rows.append(load.begin("").row())
        rows[-1] |= {"acknowledged_pages": len(load.acknowledged), "lost_pages": len(load.lost())}
        load.close()
        return rows, load.fetches


def main() -> None:
    parser = argparse.ArgumentParser(description="Restart the pods of the Helm chart under load.")
    parser.add_argument("--pages", type=int, default=800)
    parser.add_argument("--readers", type=int, default=3)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    arguments = parser.parse_args()
    # A short path, because Ray's sockets are below it.
    with tempfile.TemporaryDirectory(prefix="k") as folder:
        rows, fetches = measure(Path(folder), arguments.pages, arguments.readers, quick=arguments.quick)
    table = Table(
        "phase", "s", "fetches", "failed", "pages", "missing", "hit rate", "p50 ms", "p99 ms", "max ms"
    )
    for row in rows:
        names = ("phase", "seconds", "fetches", "failed_fetches", "pages", "missing_pages", "hit_rate")
        table.add_row(*(str(row[name]) for name in (*names, "p50_ms", "p99_ms", "max_ms")))
    Console(width=120).print(table)
    print(
        f"{rows[-1]['acknowledged_pages']} pages were acknowledged, {rows[-1]['lost_pages']} of them are lost"
    )
    write_results(rows, arguments.json)
    if arguments.plot is not None:
        plot_fetches(fetches, arguments.plot)


if __name__ == "__main__":
    main()
