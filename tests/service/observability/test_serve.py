"""`kvstore serve` as an operator watches it: its log, its status page, a report and a table."""

import json
import signal
import tarfile
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from tests.service.observability.prometheus import wait_until
from tests.service.test_cli import run, scratch, serving

__all__ = ["scratch"]


@pytest.mark.slow
def test_serve_can_be_watched(scratch: Path, tmp_path: Path, unused_port: int) -> None:
    arguments = (
        "--nodes",
        "2",
        "--metrics-port",
        str(unused_port),
        "--log-format",
        "json",
        "--log-level",
        "info",
    )
    with serving(scratch, *arguments) as (process, address):

        def told() -> dict[str, Any]:
            with urllib.request.urlopen(f"http://127.0.0.1:{unused_port}/status.json", timeout=10) as reply:
                data: dict[str, Any] = json.load(reply)
                return data

        wait_until(lambda: told()["state"] == "running", "the status page")
        assert told()["overview"]["sentence"] == "All is well: 2 storage nodes answer."
        assert told()["models"] == []
        table = run("top", "--once", "--period", "0.5", "--address", address)
        assert "node-1" in table.stdout, table.stderr
        archive = tmp_path / "report.tar.gz"
        made = run("report", "--output", str(archive), "--address", address)
        assert (made.returncode, made.stderr) == (0, "")
        with tarfile.open(archive) as opened:
            names = {member.name.partition("/")[2] for member in opened.getmembers() if member.size}
        assert {"logs/coordinator.jsonl", "logs/node-0.jsonl", "logs/node-1.jsonl", "metrics.prom"} <= names
        process.send_signal(signal.SIGTERM)
        output, errors = process.communicate(timeout=60)
    assert (process.returncode, output) == (0, "")
    lines = [json.loads(line) for line in errors.splitlines()]
    assert {"coordinator", "node-0", "node-1"} <= {line["component"] for line in lines}
    joined = [line for line in lines if line["message"].startswith("node node-0 joined")]
    assert [(line["component"], line["level"]) for line in joined] == [("coordinator", "info")]
