"""`kvstore serve` with credentials and TLS, and what it listens on without options."""

import contextlib
import ipaddress
import json
import signal
import subprocess
import time
from pathlib import Path

import grpc
import psutil
import pytest
import ray

from tests.authority import Authority
from tests.processes import descendants
from tests.service.secured import code_of
from tests.service.test_cli import refused, run, scratch, serving

__all__ = ["scratch"]

pytestmark = pytest.mark.slow


def end(process: subprocess.Popen[str]) -> None:
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0


def test_a_served_cluster_is_for_those_with_a_credential(scratch: Path, tmp_path: Path) -> None:
    file = tmp_path / "credentials.json"
    authority = Authority(tmp_path / "files")
    pair = authority.sign("server")
    tokens = {
        name: run("credentials", "add", name, "--file", str(file), *arguments).stdout.strip()
        for name, arguments in {
            "worker": ("--tenant", "acme"),
            "ops": ("--tenant", "*", "--scope", "admin"),
        }.items()
    }
    files = ("--tls-cert", str(pair.certificate), "--tls-key", str(pair.key))
    own = ("--tls-ca", str(authority.certificate), "--credentials", str(file), "--nodes", "2")
    with serving(scratch, *files, *own) as (process, address):
        known = {"KVSTORE_TLS_CA": str(authority.certificate), "KVSTORE_ADDRESS": address}
        status = json.loads(run("status", "--json", KVSTORE_TOKEN=tokens["ops"], **known).stdout)
        assert [node["alive"] for node in status["nodes"]] == [True, True]
        assert "the scope admin" in refused(run("status", KVSTORE_TOKEN=tokens["worker"], **known), 1)
        assert "needs a credential" in refused(run("ls", **known), 1)
        assert json.loads(run("ls", "--json", KVSTORE_TOKEN=tokens["worker"], **known).stdout)["chunks"] == []
        run("credentials", "revoke", "worker", "--file", str(file))
        deadline_s = time.monotonic() + 30
        while run("ls", KVSTORE_TOKEN=tokens["worker"], **known).returncode == 0:
            assert time.monotonic() < deadline_s
        end(process)


def sockets_of(process: psutil.Process) -> set[str]:
    """Inodes of a process's sockets."""
    found = set()
    for descriptor in Path(f"/proc/{process.pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            found.add(str(descriptor.readlink()).removeprefix("socket:[").removesuffix("]"))
    return found


def bound_addresses(process: psutil.Process) -> set[tuple[str, str]]:
    """(protocol, address) of the TCP sockets of a process that listen, and of its UDP sockets, as the kernel says."""
    own, found = sockets_of(process), set()
    for protocol in ("tcp", "tcp6", "udp", "udp6"):
        for line in Path(f"/proc/{process.pid}/net/{protocol}").read_text().splitlines()[1:]:
            _, local, _, state, *_ = fields = line.split()
            if fields[9] in own and (state == "0A" or protocol.startswith("udp")):
                words = local.partition(":")[0]
                in_order = b"".join(bytes.fromhex(words[at : at + 8])[::-1] for at in range(0, len(words), 8))
                address = ipaddress.ip_address(in_order)
                found.add((protocol, str(getattr(address, "ipv4_mapped", None) or address)))
    return found


def test_without_options_everything_listens_on_the_loopback(scratch: Path) -> None:
    """Every socket of every process, those of Ray included."""
    with serving(scratch, "--nodes", "2", listen=None) as (process, _):
        family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        bound: dict[str, set[tuple[str, str]]] = {}
        for member in family:
            with contextlib.suppress(psutil.NoSuchProcess, FileNotFoundError):  # Ray's helpers come and go
                bound.setdefault(member.name(), set()).update(bound_addresses(member))
        assert {"gcs_server", "raylet", "ray::StorageActor", "ray::CoordinatorActor"} <= {
            name for name, found in bound.items() if found
        }, bound
        addresses = {address for found in bound.values() for _, address in found}
        assert addresses <= {"127.0.0.1", "::1"}, bound
        end(process)


RAY_CALLS = {
    "gcs_server": "NodeInfoGcsService/GetAllNodeInfo",
    "raylet": "NodeManagerService/GetNodeStats",
    "kvstore": "CoreWorkerService/GetCoreWorkerStats",
    "ray::StorageActor": "CoreWorkerService/GetCoreWorkerStats",
    "ray::CoordinatorActor": "CoreWorkerService/GetCoreWorkerStats",
}
"""A call of Ray's own that each of its processes serves."""


def test_another_user_of_the_machine_does_not_get_into_its_ray(scratch: Path) -> None:
    """Only who may read the environment of the service's processes has the token of its Ray."""
    if tuple(map(int, ray.__version__.split(".")[:2])) < (2, 52):
        pytest.skip("this Ray knows no tokens")
    with serving(scratch) as (process, _):
        family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        (raylet,) = descendants("raylet", process.pid)
        token = raylet.environ()["RAY_AUTH_TOKEN"]
        named: dict[str, psutil.Process] = {}
        for member in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                assert not any(token in argument for argument in member.cmdline())
                named[member.name()] = member
        for name, call in RAY_CALLS.items():
            member = named[name]
            ports = [one.laddr.port for one in member.net_connections() if one.status == psutil.CONN_LISTEN]
            strangers = {ray_answer(port, call) for port in ports}
            assert grpc.StatusCode.UNAUTHENTICATED in strangers, name
            assert grpc.StatusCode.OK not in strangers, name
            assert grpc.StatusCode.OK in {ray_answer(port, call, token) for port in ports}, name
        end(process)


def ray_answer(port: int, call: str, token: str = "") -> grpc.StatusCode:
    metadata = [("authorization", f"Bearer {token}")] if token else []
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        return code_of(channel.unary_unary(f"/ray.rpc.{call}").future(b"", timeout=5, metadata=metadata))
