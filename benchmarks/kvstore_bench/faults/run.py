"""Runs the benchmark: a steady load on a cluster while its processes are killed one after the other."""

import random
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from kvstore_bench.faults.audit import audit
from kvstore_bench.faults.documents import CHUNKS, Document
from kvstore_bench.faults.events import Event
from kvstore_bench.faults.inflict import WEIGHTS, Fault, Kind, inflict
from kvstore_bench.faults.rows import AFTERWARDS_S, Row, fault_rows, totals
from kvstore_bench.faults.testbed import NODES, REPLICAS, Testbed, testbed
from kvstore_codec.errors import ServiceError
from kvstore_service.calibration import Report
from kvstore_service.scratch import scratch_folder

_CALM_S = (1.0, 3.0)
"""Shortest and longest pause between a failover and the next fault, in addition to `AFTERWARDS_S`."""
_WARM_UP_S = 3.0
_STOP_TIMEOUT_S = 90.0
_REPAIR_PATIENCE_S = 120.0
_SLOWEST_PUTS_PER_S = 4


@dataclass(frozen=True, slots=True)
class Options:
    puts: int = 10_000
    """Smallest number of acknowledged chunks."""
    kills: int = 20
    seed: int = 0
    puts_per_s: float = 120.0
    """Chunks."""
    gets_per_s: float = 20.0
    """Documents."""


@dataclass(frozen=True, slots=True)
class Outcome:
    meta: dict[str, Any]
    rows: list[Row]
    """One row per kind of fault, and one for the time between faults."""
    total: Row
    faults: list[Fault]
    events: list[Event]


def run(options: Options, report: Report) -> Outcome:
    """Runs the benchmark. Raises StartupError, and ServiceError if the cluster does not recover from a fault."""
    with scratch_folder() as folder:
        report.advance("start", 0, 1)
        with testbed(folder) as cluster:
            report.advance("start", 1, 1)
            with _load(cluster.address, options) as events:
                time.sleep(_WARM_UP_S)
                faults = _storm(options, cluster, events, report)
            report.advance("audit", 0, 1)
            documents = [Document(e.document) for e in events if e.operation == "put" and e.chunks == CHUNKS]
            found = audit(cluster.address, documents, _REPAIR_PATIENCE_S)
            report.advance("audit", 1, 1)
    meta = {
        "nodes": NODES,
        "replicas": REPLICAS,
        "durability": "durable",
        "seed": options.seed,
        "puts_per_s": options.puts_per_s,
        "gets_per_s": options.gets_per_s,
        "reads": f"one document of {CHUNKS} chunks; during a failover: started within {AFTERWARDS_S:g} s after a "
        "fault or before all nodes are members again",
    }
    return Outcome(meta, fault_rows(faults, events), totals(faults, events, found), faults, events)


def _storm(options: Options, cluster: Testbed, events: list[Event], report: Report) -> list[Fault]:
    """Inflicts faults one after the other until there are enough kills and acknowledged chunks."""
    chance = random.Random(options.seed)
    deadline_s = time.monotonic() + options.puts / _SLOWEST_PUTS_PER_S + 60 * options.kills
    faults: list[Fault] = []
    kills = acknowledged = 0
    while kills < options.kills or acknowledged < options.puts:
        if time.monotonic() > deadline_s:
            raise ServiceError(
                f"only {acknowledged} chunks were acknowledged and {kills} processes killed in time"
            )
        if kills < options.kills:
            kind = chance.choices(list(WEIGHTS), list(WEIGHTS.values()))[0]
            if not faults:
                kind = Kind.STORAGE
            faults.append(inflict(kind, cluster, chance))
            kills += faults[-1].is_kill
            time.sleep(max(0.0, faults[-1].at_s + AFTERWARDS_S - time.monotonic()))
        time.sleep(chance.uniform(*_CALM_S))
        acknowledged = sum(event.chunks for event in list(events) if event.operation == "put")
        report.advance("faults", kills, options.kills)
        report.advance("puts", min(acknowledged, options.puts), options.puts)
    return faults


@contextmanager
def _load(address: str, options: Options) -> Iterator[list[Event]]:
    """Runs the load in a separate process. Its events are appended to the yielded list as they arrive."""
    rates = [options.puts_per_s / CHUNKS, options.gets_per_s]
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "kvstore_bench.faults.load",
            address,
            str(options.seed),
            *map(str, rates),
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    events: list[Event] = []

    def collect() -> None:
        assert process.stdout is not None  # noqa: S101 (it is a pipe)
        events.extend(Event.from_line(line) for line in process.stdout)

    collector = threading.Thread(target=collect, name="kvstore-load")
    collector.start()
    try:
        yield events
    finally:
        assert process.stdin is not None  # noqa: S101 (it is a pipe)
        process.stdin.close()
        try:
            code = process.wait(_STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            code = process.wait()
        collector.join()
        assert process.stdout is not None  # noqa: S101
        process.stdout.close()
    if code:
        raise ServiceError(f"the load process ended with exit status {code}")
