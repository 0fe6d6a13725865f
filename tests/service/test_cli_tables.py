"""What commands print is whole, in a narrow pipe and on a narrow terminal: names and numbers are never cut."""

import os
import pty
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from kvstore_api.placement import Member
from kvstore_bench.cli.tables import result_table
from kvstore_cluster.arena import Arena
from kvstore_cluster.calibrations import CalibrationRegistry
from kvstore_cluster.canaries import CanaryRegistry
from kvstore_cluster.catalogue import FileCatalogue
from kvstore_cluster.coordinator import Coordinator
from kvstore_cluster.lookup import LookupRequest
from kvstore_cluster.node import StorageNode
from kvstore_cluster.put import PutOptions
from kvstore_codec.identity import ChunkId
from kvstore_service.cli.app import app
from kvstore_service.cli.console import print_table
from kvstore_service.doctor import examine
from kvstore_service.grpc_coordinator import serve_coordinator
from kvstore_service.grpc_storage import serve_storage
from kvstore_service.listen import Address
from tests.sample_chunk import sample_chunk

NODE = "storage-7f9c4b6d58-xk2vq.kvstore-production.rack-17.zone-b"
TENANT = "research-department-with-a-long-name.evaluation-of-2026"
QUOTA_BYTES = 123_400_000_000
PIPES = [{}, {"COLUMNS": "80"}, {"COLUMNS": "20"}]


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A coordinator and a storage node with long names, a chunk, a pin and a quota."""
    folder = tmp_path_factory.mktemp("catalogue")
    catalogue = FileCatalogue(folder)
    coordinator = Coordinator(catalogue)
    registries = CalibrationRegistry(folder / "calibrations"), CanaryRegistry(folder / "canaries")
    server = serve_coordinator(coordinator, *registries, address=Address("127.0.0.1", 0))
    node = StorageNode(NODE, Arena(4 << 20, 4 << 10))
    storage = serve_storage(node, host="127.0.0.1")
    coordinator.join(Member(NODE, storage.address), 1)
    chunk = sample_chunk()
    put = node.begin_put(chunk.chunk_id, chunk.encoding, len(chunk.data), options=PutOptions(tenant=TENANT))
    assert put is not None
    put.write(chunk.data)
    assert put.commit()
    node.lookup(LookupRequest([chunk.chunk_id] * 1_234, [chunk.encoding]))
    coordinator.pin([chunk.chunk_id])
    coordinator.set_quota(TENANT, QUOTA_BYTES)
    yield server.address
    storage.stop(0)
    node.close()
    server.stop(0)
    coordinator.close()
    catalogue.close()


def chunk_id() -> ChunkId:
    return sample_chunk().chunk_id


@pytest.mark.parametrize("environment", PIPES, ids=str)
@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("status", [NODE, "of 4 MB", "misses"]),
        ("ls", [NODE, TENANT, chunk_id().content_id.hex()[:16] + "+" + chunk_id().prefix_id.hex()[:16]]),
        ("pin", [chunk_id().content_id.hex()[:32], chunk_id().prefix_id.hex()[:32]]),
        ("quota", [TENANT, "123.4 GB"]),
        ("throttle", [NODE, "none"]),
        ("calibrations", ["digest", "model", "size"]),
    ],
)
def test_a_command_in_a_pipe(
    address: str,
    command: str,
    expected: list[str],
    environment: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    result = CliRunner().invoke(app, [command, "--address", address], env=environment)
    assert result.exit_code == 0, result.output
    assert [text for text in [*expected, address] if text not in result.output] == []
    assert "…" not in result.output


def test_doctor_in_a_pipe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    shown = CliRunner().invoke(app, ["doctor"]).output
    remedies = [check.remedy for check in examine() if check.remedy is not None]
    assert remedies
    assert [text for text in [*remedies, sys.executable] if text not in shown] == []
    assert "…" not in shown


@pytest.mark.parametrize("columns", [None, "80", "20"])
def test_a_benchmark_in_a_pipe(
    columns: str | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    if columns is not None:
        monkeypatch.setenv("COLUMNS", columns)
    headings = {f"a heading of many words {number}": f"field_{number}" for number in range(12)}
    row = {field: 1234567.891 + number for number, field in enumerate(headings.values())}
    print_table(result_table("a title " * 30, headings, [row]))
    shown = capsys.readouterr().out
    assert all(heading in shown for heading in headings)
    assert all(f"{value:.3f}" in shown for value in row.values())
    assert "a title " * 29 in shown


def test_a_process_in_a_pipe(address: str) -> None:
    command = [Path(sys.executable).with_name("kvstore"), "status", "--address", address]
    environment = os.environ | {"COLUMNS": "80"}
    shown = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    assert NODE in shown
    assert "…" not in shown


def test_a_narrow_terminal_folds(address: str) -> None:
    shown = _on_terminal(40, "status", "--address", address)
    assert "…" not in shown
    # A folded cell continues below itself, so a name is whole when its lines are read one after another.
    first_column = [line.split()[0] for line in shown.splitlines() if line.strip()]
    assert NODE in "".join(first_column)


def _on_terminal(columns: int, *arguments: str) -> str:
    """What a command prints on a terminal of that width, without colours."""
    terminal, side = pty.openpty()
    command = [Path(sys.executable).with_name("kvstore"), *arguments]
    environment = {name: value for name, value in os.environ.items() if name != "COLUMNS"}
    environment |= {"TERM": "dumb", "NO_COLOR": "1", "COLUMNS": str(columns)}
    with subprocess.Popen(command, env=environment, stdout=side, stdin=side) as process:
        os.close(side)
        shown = b""
        try:
            while part := os.read(terminal, 1 << 16):
                shown += part
        except OSError:  # the other side is closed
            pass
        assert process.wait(30) == 0
    os.close(terminal)
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown.decode())
