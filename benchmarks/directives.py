"""Measure lookups on a node with a million chunks while pins, quotas and TTLs change.

python benchmarks/directives.py [--before COMMIT] [--chunks 1000000] [--seconds 6] [--output FILE]

One thread looks up 256 chunks at a time. Meanwhile a second thread repeats one change: nothing; a maintenance run in
which nothing expires, as after each chunk that is written to disk; pinning and unpinning 100,000 chunks; setting and
removing a quota of a tenant with half of all chunks; or a maintenance run in which 10,000 chunks expire. With
`--before`, the cluster package of that commit is measured too, in a process of its own.

Times are processor time of both threads together. Only one of them runs at a time, so this is the time that a lookup
takes on an otherwise idle machine.
"""

import argparse
import io
import json
import os
import random
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

from kvstore_bench import write_results
from kvstore_cluster.arena import Arena
from kvstore_cluster.disk import RecordMeta
from kvstore_cluster.index import NOWHERE
from kvstore_cluster.lookup import LookupRequest
from kvstore_cluster.node import StorageNode
from kvstore_codec.identity import ChunkId, ContentId, PrefixId

LOOKED_UP = 256
_BLOCK_BYTES = 64
_PINNED = 100_000
_EXPIRING = 10_000
_BEGIN_S = 1e9
_MOST_LOOKUPS = 3000


class Clock:
    """A clock that stands still until it is set."""

    now_s = _BEGIN_S

    def __call__(self) -> float:
        return self.now_s


def filled(count: int, clock: Clock) -> tuple[StorageNode, list[ChunkId]]:
    """Makes a node with `count` chunks. Half of them belong to one tenant. Every fifth has a TTL; 10,000 chunks expire
    in each second."""
    node = StorageNode("node-0", Arena(count * _BLOCK_BYTES, _BLOCK_BYTES), clock=clock)
    names = [ChunkId(ContentId(os.urandom(32)), PrefixId(os.urandom(32))) for _ in range(count)]
    for number, name in enumerate(names):
        ends_s = _BEGIN_S + 1 + number // (5 * _EXPIRING) if number % 5 == 0 else 0.0
        tenant = "acme" if number % 2 else ""
        meta = RecordMeta(name, "exact-zstd", 60, 30, tenant=tenant, expires_at_s=ends_s, cost=256.0)
        with node._lock:
            extent = node._catalog.arena.allocate(60)
            node._catalog.insert(meta, extent=extent, location=NOWHERE, write_back=False)
    return node, names


def lookups_ms(
    node: StorageNode, names: list[ChunkId], seconds: float, beside: Callable[[], object]
) -> list[float]:
    """Times of lookups, milliseconds, in ascending order, while another thread repeats `beside`."""
    stopping = threading.Event()

    def change() -> None:
        while not stopping.is_set():
            beside()
            stopping.wait(0.01)

    changing = threading.Thread(target=change)
    changing.start()
    choose = random.Random(5)
    times_ms = []
    until = time.process_time() + seconds
    while time.process_time() < until and len(times_ms) < _MOST_LOOKUPS:
        begin = choose.randrange(len(names) - LOOKED_UP)
        wanted = names[begin : begin + LOOKED_UP]
        started = time.process_time()
        node.lookup(LookupRequest(wanted, ["exact-zstd"], with_headers=False))
        times_ms.append(1000 * (time.process_time() - started))
        time.sleep(0.001)
    stopping.set()
    changing.join()
    return sorted(times_ms)


def measure(count: int, seconds: float) -> list[dict[str, float | str]]:
    """Rows {beside, lookups, p50_ms, p99_ms, p99.9_ms, max_ms}, one per kind of change."""
    clock = Clock()
    node, names = filled(count, clock)
    pins = frozenset(names[1 : 2 * _PINNED : 2])

    def expire() -> None:
        clock.now_s += 1
        node.maintain()

    def pin() -> None:
        node.set_pins({"": pins})
        node.set_pins({})

    def limit() -> None:
        node.set_quotas({"acme": 1 << 40})
        node.set_quotas({})

    kinds: dict[str, Callable[[], object]] = {
        "nothing": lambda: None,
        "maintenance": node.maintain,
        "pins": pin,
        "quotas": limit,
        "expiry": expire,
    }
    rows: list[dict[str, float | str]] = []
    for name, beside in kinds.items():
        times_ms = lookups_ms(node, names, seconds, beside)
        row = {"beside": name, "lookups": len(times_ms)} | {
            f"p{share:g}_ms": round(times_ms[int(share / 100 * len(times_ms))], 2) for share in (50, 99, 99.9)
        }
        rows.append(row | {"max_ms": round(times_ms[-1], 2)})
    return rows


def extracted(commit: str, folder: Path) -> Path:
    """Extracts the cluster package of a commit. Returns its folder."""
    archive = ["git", "archive", commit, "cluster"]
    content = subprocess.run(archive, check=True, capture_output=True).stdout
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        tar.extractall(folder, filter="data")
    return folder / "cluster"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--before", metavar="COMMIT", help="also measure the cluster package of this commit")
    parser.add_argument("--chunks", type=int, default=1_000_000, help="chunks on the node")
    parser.add_argument("--seconds", type=float, default=6.0, help="processor time of each measurement")
    parser.add_argument("--output", type=Path, help="write the result to this file")
    parser.add_argument("--in-this-process", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.in_this_process:
        print(json.dumps(measure(options.chunks, options.seconds)))
        return
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        packages = {"after": ""}
        if options.before:
            packages["before"] = str(extracted(options.before, Path(folder)))
        for which, package in packages.items():
            path = os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH", "")]))
            command = [sys.executable, __file__, "--in-this-process"]
            command += ["--chunks", str(options.chunks), "--seconds", str(options.seconds)]
            environment = os.environ | {"PYTHONPATH": path}
            child = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
            for row in json.loads(child.stdout):
                rows.append({"cluster": which} | row)
                print(rows[-1], flush=True)
    write_results(rows, options.output, {"chunks": options.chunks, "looked_up": LOOKED_UP})


if __name__ == "__main__":
    main()
