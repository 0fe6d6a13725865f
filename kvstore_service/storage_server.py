"""The endpoints of a storage node: gRPC for all calls, and the bulk port for KV bytes."""

from pathlib import Path

from kvstore_cluster.node import StorageNode
from kvstore_cluster.repair import RepairWorker
from kvstore_cluster.slow_disk import SlowNode
from kvstore_codec.errors import AddressInUseError
from kvstore_service.bulk_server import serve_bulk, server_tls
from kvstore_service.experiments import Experiments
from kvstore_service.grpc_storage import serve_storage
from kvstore_service.large_requests import LargeRequests


class StorageServer:
    """Serves a node from construction until `stop`, on free ports of `host`. If `host` is None, it listens on the
    address under which Ray knows this machine. `tls` names the files with the certificate and the key of the bulk port.
    Raises ConfigurationError and AddressInUseError."""

    def __init__(
        self,
        node: StorageNode,
        repair: RepairWorker,
        *,
        host: str | None,
        tls: tuple[Path, Path] | None = None,
    ) -> None:
        host = host or _ray_address()
        self._experiments = Experiments(node) if isinstance(node, SlowNode) else None
        large = LargeRequests()
        self._bulk = serve_bulk(
            node, host=host, tls=server_tls(*tls) if tls else None, source=self._experiments, large=large
        )
        self.bulk_address = self._bulk.address
        try:
            self._grpc = serve_storage(
                node,
                host=host,
                bulk_endpoint=self.bulk_address,
                repair=repair,
                experiments=self._experiments,
                large=large,
            )
        except AddressInUseError:
            self._bulk.stop(0)
            raise
        self.address = self._grpc.address

    def stop(self, grace_s: float = 1.0) -> None:
        if self._experiments is not None:
            self._experiments.end()  # otherwise requests that wait under a limit would not end in time
        self._grpc.stop(grace_s)
        self._bulk.stop(grace_s)


def _ray_address() -> str:
    import ray.util

    return str(ray.util.get_node_ip_address())
