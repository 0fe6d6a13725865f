"""`kvstore bench store`, with the systems that need nothing installed."""

import json
import random
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from kvstore_bench.store.kvstore import Chunk
from kvstore_bench.store.processes import Process
from kvstore_bench.store.run import Options, run
from kvstore_bench.store.systems import SYSTEMS
from kvstore_codec.errors import ConfigurationError, StartupError
from kvstore_codec.whole_chunk import verify_chunk
from kvstore_service.cli.app import app

TIMES = {"p50_ms", "p99_ms", "operations", "system", "op", "clients"}
RATES = {"GBps", "GBps_min", "GBps_max", "size_bytes"}


class Silent:
    def advance(self, stage: str, done: int, total: int) -> None: ...

    def note(self, text: str) -> None:
        raise AssertionError(text)


@pytest.mark.parametrize("size_bytes", [64 << 10, (1 << 20) + 1])
def test_values_are_sound_chunks_of_just_that_size(size_bytes: int) -> None:
    first, second = (Chunk.of_size(key, size_bytes, random.Random(key)) for key in (1, 2))
    data = b"".join(first.parts)
    assert len(data) == size_bytes
    assert verify_chunk([data], size_bytes) == first.header
    assert data[-1000:] != b"".join(second.parts)[-1000:]


def test_every_system_of_our_own_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVSTORE_LOOKUP_TIMEOUT_S", "0.0001")  # as slow as on a busy machine, for a worker
    own = [system.name for system in SYSTEMS if not system.install and not system.on_demand]
    result = run(Options([64 << 10, 200 << 10], [1, 2], own, 0.05, 2), Silent())
    transfers = [row for row in result.rows if "size_bytes" in row]
    assert {(row["system"], row["op"]) for row in transfers} == {
        ("kvstore", "get"),
        ("kvstore", "put"),
        ("kvstore", "get+verify"),
        ("kvstore-grpc", "get"),
        ("kvstore-grpc", "put"),
        ("raw-tcp", "get"),
        ("raw-tcp", "put"),
    }
    assert len(transfers) == 7 * 4
    for row in transfers:
        assert set(row) == TIMES | RATES
        assert 0 < row["GBps_min"] <= row["GBps"] <= row["GBps_max"]
        assert 0 < row["p50_ms"] <= row["p99_ms"]
    lookups = [row for row in result.rows if "chunks" in row]
    assert [row["op"] for row in lookups] == ["lookup", "lookup+headers", "find_prefix"]
    assert all(row["chunks"] == 1000 and row["p50_ms"] > 0 for row in lookups)


@pytest.mark.slow
def test_others_are_measured_when_they_are_named() -> None:
    systems = [system.name for system in SYSTEMS if system.on_demand]
    result = run(Options([64 << 10], [1], systems, 0.05, 1), Silent())
    for op in ("get", "put"):
        assert {row["system"] for row in result.rows if row["op"] == op} == set(systems)


def test_the_command_writes_rows_and_a_picture(tmp_path: Path) -> None:
    files = ["--json", str(tmp_path / "store.json"), "--plot", str(tmp_path / "store.png")]
    command = ["bench", "store", "--systems", "raw-tcp", "--sizes", "64", "--clients", "1", "--rounds", "1"]
    done = CliRunner().invoke(app, [*command, "--seconds", "0.05", *files], catch_exceptions=False)
    assert done.exit_code == 0
    assert "raw-tcp" in done.stdout
    result = json.loads((tmp_path / "store.json").read_text())
    assert [(row["system"], row["op"]) for row in result["rows"]] == [("raw-tcp", "get"), ("raw-tcp", "put")]
    assert result["meta"]["rounds"] == 1
    assert (tmp_path / "store.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--systems", "memcached"], "there is no system memcached"),
        (["--sizes", "0"], "whole numbers from 1"),
    ],
)
def test_what_cannot_be_measured_is_said(arguments: list[str], reason: str) -> None:
    with pytest.raises(ConfigurationError, match=reason):
        CliRunner().invoke(app, ["bench", "store", *arguments], catch_exceptions=False)


def test_a_process_that_fails_is_shown_with_what_it_said() -> None:
    process = Process("broken", [sys.executable, "-c", "raise SystemExit('out of luck')"])
    with pytest.raises(StartupError, match="out of luck"):
        process.line()
    process.close()
