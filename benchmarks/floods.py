"""Flood a running `kvstore serve`, with TLS and credentials, while an honest client uses it.

python benchmarks/floods.py [--attack NAME ...] [--scale 1.0] [--seconds 10] [--json F]

For each attack: the latencies and failures of the honest client for some seconds before it, during it, and after it,
and memory and descriptors of every process of the service. Attackers connect from another address than the honest
client, unless the attack says otherwise; each side has one process.
"""

import argparse
import contextlib
import multiprocessing
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil
from flood_attacks import ATTACKS, attack
from flood_honest import Answer, be_honest, between
from flood_target import HTTP2, Target, tls_connection

from kvstore_api.frames import PREFACE
from kvstore_api.v1 import kvstore_pb2 as pb
from kvstore_api.v1 import kvstore_pb2_grpc as rpc
from kvstore_bench.results import write_results
from kvstore_service.identity import Credential, Scope, new_token
from kvstore_service.identity.credential import token_digest
from kvstore_service.identity.file import changing
from kvstore_service.listen import Address, Reservation
from tests.authority import Authority

_READY = re.compile(r"kvstore is ready at (\S+): .*\n")
_CALLERS: dict[str, tuple[str | None, Scope]] = {
    "honest": ("acme", Scope.DATA),
    "rival": ("rival", Scope.DATA),
    "everyone": (None, Scope.DATA),
    "prometheus": (None, Scope.METRICS),
}
_WARM_UP_S = 8.0
_BACK_WITHIN_S = 30.0
"""Time for memory and descriptors to come back after an attack."""
_BACK = 1.1
_NOISE_BYTES = 4 << 20
_NOISE_DESCRIPTORS = 4
_SETTLE_S = 12.0
"""Longer than any stranger may take, so that those of before are gone."""
_STRANGERS = (
    ("coordinator", "ray::CoordinatorActor", 1000),
    ("bulk", "ray::StorageActor", 100),
    ("metrics", "kvstore", 30),
)
_BEGINNINGS = {"bulk": PREFACE, "metrics": b"GET /metrics HTTP/1.1\r\n"}
_SPAWN = multiprocessing.get_context("spawn")
Row = dict[str, Any]


@dataclass(frozen=True)
class Usage:
    """Of one process."""

    rss_bytes: int
    descriptors: int

    def is_back_at(self, before: "Usage") -> bool:
        return (
            self.rss_bytes <= _BACK * before.rss_bytes + _NOISE_BYTES
            and self.descriptors <= _BACK * before.descriptors + _NOISE_DESCRIPTORS
        )


@contextlib.contextmanager
def served(folder: Path) -> Iterator[tuple[Target, int]]:
    """A running service with credentials and TLS, and its process id."""
    authority, credentials = Authority(folder / "files"), folder / "credentials.json"
    pair = authority.sign("server")
    tokens = {}
    with changing(credentials) as known:
        for name, (tenant, scope) in _CALLERS.items():
            made, tokens[name] = new_token()
            known.append(Credential(made, name, tenant, frozenset({scope}), token_digest(tokens[name])))
    reserved = Reservation(Address("127.0.0.1", 0))
    reserved.release()
    metrics = reserved.address
    options = {
        "--listen": "127.0.0.1:0", "--memory": "32MiB", "--metrics-port": str(metrics.port),
        "--credentials": str(credentials), "--tls-cert": str(pair.certificate), "--tls-key": str(pair.key),
        "--tls-ca": str(authority.certificate),
    }  # fmt: skip
    command = [
        str(Path(sys.executable).with_name("kvstore")),
        "serve",
        *(x for o in options.items() for x in o),
    ]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, start_new_session=True, env=os.environ | {"TMPDIR": str(folder)}
    ) as process:  # fmt: skip
        try:
            ready = _READY.fullmatch(process.stdout.readline()) if process.stdout is not None else None
            if ready is None:
                raise RuntimeError("the service did not start")
            target = Target(
                {"coordinator": ready[1], "metrics": str(metrics)}, authority.certificate, credentials, tokens
            )
            with target.connector("honest").channel(ready[1]) as channel:
                (node,) = rpc.CoordinatorStub(channel).Membership(pb.MembershipRequest(), timeout=10).members
            target.ports.update(node=node.endpoint, bulk=node.bulk_endpoint)
            yield target, process.pid
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()


def usage(pid: int) -> dict[str, Usage]:
    """Of each process of the service, by its name."""
    found: dict[str, Usage] = {}
    family = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    for member in sorted(family, key=lambda one: one.pid):
        with contextlib.suppress(psutil.NoSuchProcess):
            name = member.name()
            while name in found:
                name += "'"
            found[name] = Usage(member.memory_info().rss, member.num_fds())
    return found


@dataclass(frozen=True)
class Sides:
    """Connections to the processes of the honest client and of the attacker."""

    honest: Connection
    attacker: Connection


@contextlib.contextmanager
def sides(target: Target, warm_up_s: float = _WARM_UP_S) -> Iterator[Sides]:
    """Both processes. The honest client has warmed the service up."""
    ours: list[Connection] = []
    running = []
    for side in (be_honest, attack):
        parent, child = _SPAWN.Pipe()
        running.append(_SPAWN.Process(target=side, args=(target, child), daemon=True))
        running[-1].start()
        ours.append(parent)
    try:
        for parent in ours:
            parent.recv()  # it is ready
        time.sleep(warm_up_s)
        yield Sides(*ours)
    finally:
        for process in running:
            process.kill()
            process.join()


def flooded(both: Sides, pid: int, name: str, *, scale: float, seconds: float) -> tuple[list[Row], list[Row]]:
    """Rows of the honest client's latencies, and of the service's processes."""
    times = [time.monotonic()]
    time.sleep(seconds / 2)
    before = most = usage(pid)
    times.append(time.monotonic())
    _, count, longer = ATTACKS[name]
    both.attacker.send((name, max(1, round(count * scale)), seconds * longer))
    while not both.attacker.poll(0.5):
        most = {
            one: Usage(
                max(now.rss_bytes, most.get(one, now).rss_bytes),
                max(now.descriptors, most.get(one, now).descriptors),
            )
            for one, now in usage(pid).items()
        }
    reached = both.attacker.recv()
    times.append(time.monotonic())
    after, back_s = _come_back(pid, before)
    times.append(time.monotonic())
    time.sleep(seconds / 2)
    times.append(time.monotonic())
    both.honest.send("answers")
    answers: list[Answer] = both.honest.recv()
    phases = {"before": times[0:2], "during": times[1:3], "after": times[3:5]}
    rows = [
        {"attack": name, "reached": reached, "phase": phase} | row
        for phase, (begin_s, end_s) in phases.items()
        for row in _latencies(list(between(answers, begin_s, end_s)))
    ]
    processes = [
        {
            "attack": name,
            "process": one,
            "rss_before_bytes": before[one].rss_bytes,
            "rss_most_bytes": most.get(one, before[one]).rss_bytes,
            "rss_after_bytes": after[one].rss_bytes if one in after else 0,
            "descriptors_before": before[one].descriptors,
            "descriptors_most": most.get(one, before[one]).descriptors,
            "descriptors_after": after[one].descriptors if one in after else 0,
            "back": one in after and after[one].is_back_at(before[one]),
            "back_s": back_s,
        }
        for one in before
    ]
    return rows, processes


def _come_back(pid: int, before: dict[str, Usage]) -> tuple[dict[str, Usage], float]:
    """Usage once it is back at `before`, or after _BACK_WITHIN_S, and how long that took."""
    begun_s = time.monotonic()
    while True:
        after, took_s = usage(pid), time.monotonic() - begun_s
        is_back = all(one in after and after[one].is_back_at(used) for one, used in before.items())
        if is_back or took_s > _BACK_WITHIN_S:
            return after, round(took_s, 1)
        time.sleep(0.5)


def _latencies(answers: list[Answer]) -> Iterator[Row]:
    for kind in sorted({answer.kind for answer in answers}):
        took_ms = sorted(1000 * answer.took_s for answer in answers if answer.kind == kind)
        failures = [answer.failure for answer in answers if answer.kind == kind and answer.failure]
        yield {
            "request": kind,
            "requests": len(took_ms),
            "failed": len(failures),
            "p50_ms": round(statistics.median(took_ms), 2),
            "p99_ms": round(took_ms[min(len(took_ms) - 1, int(0.99 * len(took_ms)))], 2),
            "first_failure": failures[0] if failures else "",
        }


def strangers_memory(target: Target, pid: int) -> list[Row]:
    """Memory that each connection takes that has done its TLS handshake and shows no credential."""
    rows = []
    for port, process, count in _STRANGERS:
        time.sleep(_SETTLE_S)
        before = usage(pid)[process]
        with contextlib.ExitStack() as connections:
            for number in range(count):
                connected = connections.enter_context(
                    tls_connection(target, port, f"127.0.0.{number % 200 + 2}")
                )
                connected.sendall(_BEGINNINGS.get(port, HTTP2))
            time.sleep(1)
            after = usage(pid)[process]
        rows.append(
            {
                "port": port,
                "connections": count,
                "bytes_each": round((after.rss_bytes - before.rss_bytes) / count),
                "descriptors_each": round((after.descriptors - before.descriptors) / count, 2),
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--attack", action="append", choices=sorted(ATTACKS), metavar="NAME")
    parser.add_argument("--scale", type=float, default=1.0, help="of the attacks' numbers")
    parser.add_argument("--seconds", type=float, default=10.0, help="of each attack")
    parser.add_argument(
        "--memory", action="store_true", help="measure the memory of strangers' connections only"
    )
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    rows: list[Row] = []
    processes: list[Row] = []
    with (
        tempfile.TemporaryDirectory(prefix="kv") as folder,
        served(Path(folder)) as (target, pid),
        sides(target) as both,
    ):
        memory = strangers_memory(target, pid)
        for row in memory:
            print(row)
        for name in () if given.memory else given.attack or ATTACKS:
            more, used = flooded(both, pid, name, scale=given.scale, seconds=given.seconds)
            rows += more
            processes += used
            _show(more, used)
            write_results(rows, given.json, processes=processes, memory=memory)


def _show(rows: list[Row], processes: list[Row]) -> None:
    print(f"\n{rows[0]['attack']}: {rows[0]['reached']}")
    for row in rows:
        print(
            f"  {row['phase']:7} {row['request']:28} {row['requests']:6} requests {row['failed']:4} failed"
            f"  p50 {row['p50_ms']:8.2f} ms  p99 {row['p99_ms']:8.2f} ms  {row['first_failure'][:90]}"
        )
    for row in processes:
        print(
            f"  {row['process']:24} {row['rss_before_bytes'] >> 20:5} -> {row['rss_most_bytes'] >> 20:5} -> "
            f"{row['rss_after_bytes'] >> 20:5} MiB  {row['descriptors_before']:5} -> {row['descriptors_most']:5} -> "
            f"{row['descriptors_after']:5} descriptors  {'back' if row['back'] else 'NOT back'} in {row['back_s']} s"
        )


if __name__ == "__main__":
    main()
