"""The compared systems: the commands that start their processes, and the operations that are measured."""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

PEERS = Path(__file__).parents[2] / "peers"


@dataclass(frozen=True, slots=True)
class Group:
    """Systems that share a server and its clients."""

    name: str
    server: tuple[str, ...]
    client: tuple[str, ...]
    """Command of a client process. The server's address is added as the last argument."""


@dataclass(frozen=True, slots=True)
class System:
    name: str
    group: Group
    methods: Mapping[str, str]
    """Operation -> method of the client."""
    install: str = ""
    """Command that installs a peer. Empty for a system of this project."""
    on_demand: bool = False
    """Whether it is measured only when it is named."""

    @property
    def is_installed(self) -> bool:
        return not self.install or (PEERS / self.group.name / ".venv" / ".installed").exists()


def _own(name: str) -> Group:
    module = [sys.executable, "-m", "kvstore_bench.store"]
    return Group(
        name,
        (*module[:2], f"{module[2]}.server", name),
        (*module[:2], f"{module[2]}.client", name),
    )


def _peer(name: str) -> System:
    python, script = PEERS / name / ".venv" / "bin" / "python", PEERS / name / "store.py"
    command = (str(python), str(script))
    return System(
        name,
        Group(name, (*command, "serve"), (*command, "client")),
        {"get": "get", "put": "put"},
        f"python benchmarks/peers/install.py {name}",
    )


def _on_demand(name: str) -> System:
    return System(name, _own(name), {"get": "get", "put": "put"}, on_demand=True)


_KVSTORE = _own("kvstore")
SYSTEMS = (
    System("kvstore", _KVSTORE, {"get": "get", "put": "put", "get+verify": "get_verified"}),
    System("kvstore-grpc", _KVSTORE, {"get": "get_over_grpc", "put": "put_over_grpc"}),
    _on_demand("kvstore-tls"),
    _on_demand("kvstore-mtls"),
    _peer("redis"),
    _peer("mooncake"),
    _peer("lmcache"),
    System("raw-tcp", _own("raw-tcp"), {"get": "get", "put": "put"}),
    _on_demand("kvstore-disk"),
    _on_demand("kvstore-encrypted"),
)
PEER_NAMES = tuple(system.name for system in SYSTEMS if system.install)
