"""Server process of a measured system. It prints its address and runs until its stdin ends.

python -m kvstore_bench.store.server kvstore [HOST [PORT [BYTES]]] | SYSTEM

SYSTEM is kvstore-disk, kvstore-encrypted, kvstore-tls, kvstore-mtls or raw-tcp.

HOST and PORT are the coordinator's address. The node listens on the same host and has BYTES of memory. With a disk, in
a temporary folder, chunks leave memory at once: every get reads the disk.
"""

import secrets
import socket
import struct
import sys
import tempfile
import threading
from pathlib import Path
from typing import TYPE_CHECKING

from kvstore_api.affinity import shared_where_local
from kvstore_api.byte_stream import ByteStream
from kvstore_service.security import INSECURE, Security

if TYPE_CHECKING:
    from kvstore_cluster.arena import Arena
    from kvstore_cluster.node import StorageNode

HOST = "127.0.0.1"
MEMORY_BYTES = 1 << 30
DISK_BYTES = 4 << 30
DEMOTION_PERIOD_S = 0.01
TIMEOUT_S = 30.0
REQUEST = struct.Struct("!QQQ")
"""A request of `raw-tcp`: 1 for a put and 0 for a get, key, size in bytes."""


def main() -> None:
    if sys.argv[1] == "raw-tcp":
        listener = socket.create_server((HOST, 0))
        threading.Thread(target=accept, args=(listener,), daemon=True).start()
        print(f"{HOST}:{listener.getsockname()[1]}", flush=True)
        sys.stdin.read()
    else:
        host, port, size_bytes = (*sys.argv[2:], *(HOST, "0", str(MEMORY_BYTES))[len(sys.argv) - 2 :])
        with tempfile.TemporaryDirectory() as folder:
            serve_kvstore(host, int(port), int(size_bytes), sys.argv[1], Path(folder))


def accept(listener: socket.socket) -> None:
    """Serves each connection in a thread of its own."""
    while True:
        connected, _ = listener.accept()
        stream = ByteStream(connected, shared_where_local)
        threading.Thread(target=serve_raw, args=(stream,), daemon=True).start()


def serve_raw(stream: ByteStream) -> None:
    """Serves one connection of `raw-tcp`, the upper bound for this machine: it only copies bytes between a socket and
    memory that is already allocated."""
    values: dict[int, memoryview] = {}
    request = bytearray(REQUEST.size)
    while True:
        try:
            stream.receive_into(request, 3600)
        except ConnectionError:
            stream.close()
            return
        stream.affinity.join_peer()
        is_put, key, size_bytes = REQUEST.unpack(request)
        if len(values.get(key, b"")) != size_bytes:
            values[key] = memoryview(bytearray(size_bytes))
        if is_put:
            stream.receive_into(values[key], TIMEOUT_S)
            stream.send([request], TIMEOUT_S)
        else:
            stream.send([values[key]], TIMEOUT_S)


def serve_kvstore(host: str, port: int, size_bytes: int, system: str, folder: Path) -> None:
    """Runs a storage node and a coordinator as `kvstore serve` does, but without Ray. Prints the three addresses
    `storage,bulk,coordinator`, and with TLS the folder of the certificates behind them."""
    from kvstore_api.placement import Member
    from kvstore_cluster.arena import Arena
    from kvstore_cluster.calibrations import CalibrationRegistry
    from kvstore_cluster.canaries import CanaryRegistry
    from kvstore_cluster.catalogue import FileCatalogue
    from kvstore_cluster.coordinator import Coordinator
    from kvstore_service.bulk_server import serve_bulk
    from kvstore_service.grpc_coordinator import serve_coordinator
    from kvstore_service.grpc_storage import serve_storage
    from kvstore_service.listen import Address

    arena = Arena(size_bytes)
    while arena.populate():
        pass
    node = _node(arena, system, folder)
    security = _security(system, folder)
    tls = security.server_tls()
    bulk = serve_bulk(node, host=host, tls=tls)
    storage = serve_storage(node, host=host, bulk_endpoint=bulk.address, tls=tls)
    metadata = Coordinator(FileCatalogue(folder))
    metadata.join(Member(node.node_id, storage.address, bulk_endpoint=bulk.address), incarnation=1)
    registry = CalibrationRegistry(folder / "calibrations")
    canaries = CanaryRegistry(folder / "canaries")
    coordinator = serve_coordinator(
        metadata, registry, canaries, address=Address(host, port), security=security
    )
    printed = (storage.address, bulk.address, coordinator.address, str(folder) if tls else "")
    print(",".join(filter(None, printed)), flush=True)
    sys.stdin.read()
    for server in (bulk, storage, coordinator):
        server.stop(0)


def _security(system: str, folder: Path) -> Security:
    """Makes certificates in `folder` for a system that needs them."""
    if not system.endswith("tls"):
        return INSECURE
    from kvstore_bench.store.certificates import make_certificates, of_server

    make_certificates(folder)
    return of_server(folder, mutual=system == "kvstore-mtls")


def _node(arena: "Arena", system: str, folder: Path) -> "StorageNode":
    from kvstore_cluster.disk import SegmentStore
    from kvstore_cluster.encryption import EncryptionKeys
    from kvstore_cluster.maintenance import MaintenanceThread
    from kvstore_cluster.node import StorageNode
    from kvstore_cluster.residency import Residency

    if system not in ("kvstore-disk", "kvstore-encrypted"):
        return StorageNode("node-0", arena)

    class OnlyOnDisk(Residency):
        def promotes(self, length: int, size_bytes: int) -> bool:  # noqa: ARG002
            return False

        def watermarks(self) -> tuple[float, float]:
            return 0.0, 0.0

    keys = EncryptionKeys([secrets.token_bytes(32)]) if system == "kvstore-encrypted" else None
    store = SegmentStore(folder / "disk", DISK_BYTES, keys=None if keys is None else lambda: keys)
    node = StorageNode("node-0", arena, store=store, residency=OnlyOnDisk())
    MaintenanceThread(node, arena, DEMOTION_PERIOD_S).start()
    return node


if __name__ == "__main__":
    main()
