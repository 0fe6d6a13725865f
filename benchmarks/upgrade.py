"""Upgrade a cluster to this version and back: what the version before has stored, this one reads, and the reverse.

python benchmarks/upgrade.py [--before REVISION] [--pages 200] [--json FILE]

Each version runs its own `kvstore serve` with two nodes over the same data folder, and its own client. It stores pages
durably and sets a quota, and reads all that was stored before it, byte by byte. The order is: the version before, this
one, the version before, this one. `--before` is a revision of this repository.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from kvstore_bench.results import write_results
from kvstore_codec.errors import StartupError
from kvstore_service.parent_death import end_with_parent

ROOT = Path(__file__).parents[1]
BEFORE = "3cf47fb"
"""The revision before storage nodes followed a Ray cluster."""
_FOLDERS = ("benchmarks", "api", "codec", "client", "cluster", "")
_READY = re.compile(r"kvstore is ready at (\S+): ")
_KVSTORE = ("-c", "from kvstore_service.cli.app import main; main()")
_TIMEOUT_S = 120.0
# Stores or reads pages, and prints how many are right.
_CLIENT = """
import random, sys
from kvstore_client import connect
from kvstore_client.pages import PageNamespace

address, verb, first, last = sys.argv[1:]
numbers = range(int(first), int(last))
keys = [b"%d" % number for number in numbers]
pages = [random.Random(number).randbytes(20_000) for number in numbers]
with connect(address, put_durability="durable") as client:
    store = client.pages(PageNamespace(b"upgrade", "random", 0, 1))
    if verb == "put":
        print(sum(store.put(keys, pages).ok))
    else:
        views = [bytearray(len(page)) for page in pages]
        result = store.get_into(keys, views)
        print(sum(ok and view == page for ok, view, page in zip(result.ok, views, pages)))
"""


def checkout(revision: str, folder: Path) -> Path:
    """Writes a revision with its generated stubs to `folder`. Raises CalledProcessError for an unknown one."""
    folder.mkdir()
    archive = folder / "archive.tar"
    command = [shutil.which("git") or "git", "archive", f"--output={archive}", revision]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    with tarfile.open(archive) as files:
        files.extractall(folder, filter="data")
    contract = Path("api") / "kvstore_api" / "v1"
    for proto in (ROOT / contract).glob("*.proto"):
        if proto.read_bytes() != (folder / contract / proto.name).read_bytes():
            raise ValueError(
                f"{proto.name} of {revision} is another one: generate its stubs as hatch_build.py does"
            )
    for stub in (ROOT / contract).glob("*_pb2*"):
        shutil.copy(stub, folder / contract)
    return folder


class Version:
    """The programs of a checkout."""

    def __init__(self, tree: Path) -> None:
        self._tree = tree
        self._environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(str(tree / name) for name in _FOLDERS)
        }

    def run(self, *arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, *arguments],
            cwd=self._tree,
            env=self._environment,
            check=True,
            capture_output=True,
            text=True,
            timeout=_TIMEOUT_S,
        )
        return done.stdout

    def serve(self, data: Path) -> tuple[subprocess.Popen[str], str]:
        """Starts a cluster. Returns its process and address. Raises StartupError."""
        options = ("--nodes", "2", "--memory", "16MiB", "--disk", "256MiB", "--data-dir", str(data))
        service = subprocess.Popen(
            [sys.executable, *_KVSTORE, "serve", *options, "--listen", "127.0.0.1:0"],
            cwd=self._tree,
            env=self._environment,
            stdout=subprocess.PIPE,
            text=True,
            preexec_fn=end_with_parent,
        )
        ready = _READY.match(service.stdout.readline() if service.stdout is not None else "")
        if ready is None:
            service.kill()
            raise StartupError(f"the service of {self._tree} did not start; its errors are above")
        return service, ready[1]


def measure(before: str, pages: int, folder: Path, turns: int = 4) -> list[dict[str, Any]]:
    """One row for each start of a version."""
    versions = {before: Version(checkout(before, folder / "before")), "this version": Version(ROOT)}
    rows, stored = [], 0
    for turn, name in enumerate([before, "this version"] * (turns // 2) + [before] * (turns % 2)):
        version = versions[name]
        began_s = time.monotonic()
        service, address = version.serve(folder / "data")
        ready_s = time.monotonic() - began_s
        with service:
            right = int(version.run("-c", _CLIENT, address, "get", "0", str(stored))) if stored else 0
            quotas = version.run(*_KVSTORE, "quota", "--address", address, "--json") if turn else ""
            version.run(*_KVSTORE, "quota", f"tenant-{turn}", "1GiB", "--address", address)
            put = int(version.run("-c", _CLIENT, address, "put", str(stored), str(stored + pages)))
            service.terminate()
        status = service.returncode
        rows.append(
            {
                "version": name,
                "ready_s": round(ready_s, 2),
                "stored_before": stored,
                "read_right": right,
                "quotas_of_before": sum(f'"tenant-{earlier}"' in quotas for earlier in range(turn)),
                "stored": put,
                "exit_status": status,
            }
        )
        stored += pages
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description="Upgrade a cluster to this version and back.")
    parser.add_argument("--before", default=BEFORE)
    parser.add_argument("--pages", type=int, default=200)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="kvstore-upgrade-") as folder:
        rows = measure(arguments.before, arguments.pages, Path(folder))
    table = Table(*(name.replace("_", " ") for name in rows[0]))
    for row in rows:
        table.add_row(*map(str, row.values()))
    Console().print(table)
    write_results(rows, arguments.json)


if __name__ == "__main__":
    main()
