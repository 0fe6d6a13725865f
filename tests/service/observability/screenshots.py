"""Pictures of the status page: `python -m tests.service.observability.screenshots docs` makes those of the docs.

They show made-up clusters: one of a hundred nodes with some trouble, and one without nodes."""

import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from kvstore_api.v1 import kvstore_pb2 as pb
from kvstore_client.spans import STAGES
from kvstore_service.listen import Address, Reservation
from kvstore_service.metrics_server import metrics_endpoint
from kvstore_service.observability.status_page import StatusPage
from tests.clock import Clock

MANY_NODES = 100
_GB = 10**9
_WAIT_MS = 3000
_ROUNDS, _ROUND_S = 40, 30.0


def browser() -> str | None:
    return shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def made_up_stats(nodes: int, round_: int = 0) -> pb.ClusterStatsReply:
    """A cluster of so many nodes, of which one is down, one has a failed disk, and one is being drained."""
    reply = pb.ClusterStatsReply(epoch=41)
    for number in range(nodes):
        picked = random.Random(number)
        node = reply.nodes.add(alive=number != 7)
        node.member.node_id, node.member.endpoint = f"node-{number}", f"10.0.0.{number + 1}:7421"
        node.member.draining = number == 12
        if number == 7:
            node.error = "DEADLINE_EXCEEDED: did not answer within 1 s"
            continue
        stats = node.stats
        stats.node_id, stats.chunks = node.member.node_id, picked.randrange(40_000, 60_000)
        stats.bytes_limit, stats.bytes_used = 64 * _GB, int(64 * _GB * picked.uniform(0.6, 0.98))
        stats.gauges["disk_bytes_limit"] = 2000 * _GB
        stats.gauges["disk_bytes_used"] = int(2000 * _GB * picked.uniform(0.3, 0.9))
        if number == 3:
            stats.disk_error = "/data: Input/output error; check that disk"
        if number == 5:
            stats.gauges["repair_left"] = 312
        wave = 1 + 0.3 * ((round_ + number) % 7)
        stats.counters["hits"] = int(round_ * 9000 * wave)
        stats.counters["misses"] = int(round_ * 2000 * (1 + (round_ % 5)))
        stats.counters["bytes_out"] = int(round_ * 0.4 * _GB * wave)
        stats.counters["bytes_in"] = int(round_ * 0.05 * _GB * wave)
        stats.counters["evictions"] = round_ * picked.randrange(30)
        for tier, encoding, size in (
            ("memory", "medium-klt-pco", 30 * _GB),
            ("memory", "exact-zstd", 10 * _GB),
            ("disk", "medium-klt-pco", 700 * _GB),
            ("disk", "exact-zstd", 300 * _GB),
        ):
            stats.samples.add(name="stored_bytes", labels=[tier, encoding], value=size)
        for at, tenant in enumerate(("acme", "globex", "initech", "")):
            size = int(200 * _GB / (at + 1))
            stats.samples.add(name="tenant_bytes", labels=[tenant], value=size)
            stats.samples.add(name="tenant_requested_chunks", labels=[tenant], value=1000)
            stats.samples.add(name="tenant_hits", labels=[tenant], value=900 - 200 * at)
            if at < 2:
                stats.samples.add(name="tenant_limit_bytes", labels=[tenant], value=250 * _GB)
    for number in range(4 if nodes else 0):
        reply.fetches.append(_made_up_fetch(number))
    return reply


def _made_up_fetch(number: int) -> pb.FetchSummary:
    fetch = pb.FetchSummary(
        request_id=f"chatcmpl-{4711 + number}",
        worker="worker-3 (812)",
        tenant=("acme", "globex")[number % 2],
        ended_unix_s=time.time() - 20 * number,
        took_s=0.41 + 0.1 * number,
        predicted_s=0.38 + 0.1 * number,
        chunks=48,
        delivered=44,
        computed=4,
        size_bytes=62_000_000,
    )
    picked = random.Random(number)
    begins = {"lookup": 0.0, "plan": 0.012, "receive": 0.02, "decode": 0.03, "restore": 0.035, "compute": 0.1}
    for stage in STAGES:
        if stage not in begins:
            continue
        at = begins[stage]
        for _ in range(1 if stage in ("lookup", "plan") else 6):
            length = 0.01 if stage in ("lookup", "plan") else picked.uniform(0.02, 0.06)
            fetch.spans.add(stage=stage, start_s=at, end_s=at + length)
            at += length + picked.uniform(0, 0.02)
    return fetch


def made_up_models() -> dict[str, Any]:
    names = ("HuggingFaceTB/smollm2-135m", "Qwen/Qwen3-8B")
    return {
        "models": [
            {"digest": "4f1c2a", "model_id": name, "dtype": "bfloat16", "host": "worker-1", "refused": at}
            for at, name in enumerate(names)
        ],
        "calibrations": [
            {"digest": "9ab31c77d0e2", "model": "4f1c2a", "model_id": names[1], "bytes": 31_000_000}
        ],
    }


def dumped(address: str) -> str:
    """The page's elements as the browser has them after its scripts ran."""
    return _run("--dump-dom", address)


def picture(address: str, file: Path, *, dark: bool, width: int = 1240, height: int = 1500) -> None:
    theme = (
        ["--blink-settings=preferredColorScheme=0"] if dark else ["--blink-settings=preferredColorScheme=1"]
    )
    _run(f"--screenshot={file}", f"--window-size={width},{height}", "--hide-scrollbars", *theme, address)


def _run(*arguments: str) -> str:
    program = browser()
    assert program is not None
    with tempfile.TemporaryDirectory() as profile:
        ended = subprocess.run(
            [
                program,
                "--headless=new",
                "--no-sandbox",
                "--disable-gpu",
                "--no-first-run",
                "--disable-background-networking",
                f"--user-data-dir={profile}",
                f"--virtual-time-budget={_WAIT_MS}",
                *arguments,
            ],
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        )
    return ended.stdout


def main(folder: Path) -> None:
    for name, nodes in (("status", MANY_NODES), ("status-empty", 0)):
        clock = Clock(time.time() - _ROUNDS * _ROUND_S)
        page = StatusPage(clock, clock)
        reservation = Reservation(Address("127.0.0.1", 0))
        reservation.release()
        with metrics_endpoint(reservation.address, page=page):
            for round_ in range(_ROUNDS):
                reply, models = made_up_stats(nodes, round_), made_up_models() if nodes else {}
                clock.now_s += _ROUND_S
                page.observe("kvstore.example:7420", lambda r=reply: r, lambda m=models: m)  # type: ignore[misc]
            for theme in ("light", "dark"):
                file = folder / f"{name}-{theme}.png"
                height = 2000 if nodes else 700
                picture(f"http://{reservation.address}/", file, dark=theme == "dark", height=height)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
