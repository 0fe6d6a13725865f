"""A storage node and its coordinator behind their real servers, in a process of their own that can be killed.

    python -m tests.vllm.store_process FOLDER PORT

It runs in the environment of the service, without Ray. Each line of JSON on standard input is answered by a line of
JSON about the node. `{"damage": PREFIX}` damages the chunk with this prefix id (hexadecimal) in memory first.
"""

import json
import sys
import time
from pathlib import Path

from kvstore_api.placement import Member
from kvstore_cluster.arena import Arena
from kvstore_cluster.calibrations import CalibrationRegistry
from kvstore_cluster.canaries import CanaryRegistry
from kvstore_cluster.catalogue import FileCatalogue
from kvstore_cluster.coordinator import Coordinator
from kvstore_cluster.node import StorageNode
from kvstore_service.bulk_server import serve_bulk
from kvstore_service.grpc_coordinator import serve_coordinator
from kvstore_service.grpc_storage import serve_storage
from kvstore_service.listen import Address
from tests.damage import flip_bit


def main(folder: Path, port: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    node = StorageNode("node-0", Arena(512 << 20))
    server, bulk = serve_storage(node, host="127.0.0.1"), serve_bulk(node, host="127.0.0.1")
    coordinator = Coordinator(FileCatalogue(folder), replicas=1)
    coordinator.join(Member("node-0", server.address, bulk_endpoint=bulk.address), incarnation=time.time_ns())
    served = serve_coordinator(
        coordinator,
        CalibrationRegistry(folder / "calibrations"),
        CanaryRegistry(folder / "canaries"),
        address=Address("127.0.0.1", port),
    )
    print(json.dumps({"address": served.address, "bulk": bulk.address}), flush=True)
    for line in sys.stdin:
        if damaged := json.loads(line).get("damage"):
            damage(node, bytes.fromhex(damaged))
        stats = node.stats()
        told = {"chunks": stats.chunks, "leases": stats.leases, **stats.counters}
        print(json.dumps(told), flush=True)
    for part in (served, server, bulk):
        part.stop(0)


def damage(node: StorageNode, prefix_id: bytes) -> None:
    for variant in node.list()[0]:
        if variant.chunk_id.prefix_id == prefix_id:
            with node.open(variant.chunk_id, variant.encoding) as reader:
                flip_bit(next(reader.pieces(0, 1, variant.size_bytes))[0])


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
