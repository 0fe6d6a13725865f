import contextlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest

from benchmarks.deaf_client import DeafClient
from kvstore_api.v1 import kvstore_pb2 as pb
from kvstore_api.v1 import kvstore_pb2_grpc as rpc
from kvstore_cluster.arena import Arena
from kvstore_cluster.catalogue import FileCatalogue
from kvstore_cluster.coordinator import Coordinator
from kvstore_cluster.node import StorageNode
from kvstore_cluster.slow_disk import SlowNode
from kvstore_service.experiments import Experiments
from kvstore_service.grpc_server import MAX_REPLY_BYTES, GrpcServer
from kvstore_service.grpc_storage import serve_storage
from kvstore_service.large_requests import LargeRequests
from kvstore_service.listen import Address, Reservation
from tests.service.bulk_port import Port, served_port
from tests.service.repair_cluster import Cluster


@dataclass
class ServedNode:
    """A storage node behind its real server, and a client of it."""

    node: StorageNode
    server: GrpcServer
    channel: grpc.Channel

    @property
    def stub(self) -> rpc.StorageStub:
        return rpc.StorageStub(self.channel)


@contextlib.contextmanager
def served(
    memory_bytes: int, large: LargeRequests | None = None, *, experiments: bool = False
) -> Iterator[ServedNode]:
    node = (SlowNode if experiments else StorageNode)("node-0", Arena(memory_bytes, 4 << 10))
    server = serve_storage(
        node,
        host="127.0.0.1",
        large=large,
        experiments=Experiments(node) if isinstance(node, SlowNode) else None,
    )
    options = [("grpc.max_receive_message_length", MAX_REPLY_BYTES)]
    try:
        with grpc.insecure_channel(server.address, options) as channel:
            yield ServedNode(node, server, channel)
    finally:
        server.stop(0)
    node.check_integrity()


@contextlib.contextmanager
def deaf(node: ServedNode) -> Iterator[DeafClient]:
    client = DeafClient(node.server.address)
    try:
        yield client
    finally:
        client.close()


def verified(node: ServedNode) -> grpc.StatusCode:
    """How a verification of the whole node ends."""
    call = node.stub.Verify(pb.VerifyRequest())
    with contextlib.suppress(grpc.RpcError):
        assert list(call)[-1].done
    return call.code()


@pytest.fixture
def storage() -> Iterator[ServedNode]:
    with served(4 << 20) as node:
        yield node


@pytest.fixture
def large_storage() -> Iterator[ServedNode]:
    with served(512 << 20) as node:
        yield node


@pytest.fixture
def make_cluster(tmp_path: Path) -> Iterator[Callable[[int], Cluster]]:
    with ExitStack() as stack:

        def make(replicas: int) -> Cluster:
            catalogue = FileCatalogue(tmp_path)
            stack.callback(catalogue.close)
            coordinator = Coordinator(catalogue, replicas=replicas)
            stack.callback(coordinator.close)
            cluster = Cluster(coordinator)
            stack.callback(lambda: [cell.stop() for cell in cluster.cells.values()])
            return cluster

        yield make


@pytest.fixture
def port() -> Iterator[Port]:
    """A bulk port in front of an empty node."""
    with served_port() as made:
        yield made


@pytest.fixture
def unused_port() -> int:
    reservation = Reservation(Address("127.0.0.1", 0))
    reservation.release()
    return reservation.address.port
