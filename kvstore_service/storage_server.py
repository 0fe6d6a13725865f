"""The endpoints of a storage node: gRPC for all calls, and the bulk port for KV bytes."""

from kvstore_cluster.node import StorageNode
from kvstore_cluster.repair import RepairWorker
from kvstore_cluster.slow_disk import SlowNode
from kvstore_codec.errors import AddressInUseError
from kvstore_service.bulk_server import serve_bulk
from kvstore_service.experiments import Experiments
from kvstore_service.grpc_storage import serve_storage
from kvstore_service.large_requests import LargeRequests
from kvstore_service.security import INSECURE, Security
from kvstore_service.tracing import NodeTracing


class StorageServer:
    """Serves a node from construction until `stop`, on `port` of `host` and the next one, or on free ports. If `host`
    is None, it listens on the address under which Ray knows this machine. `otlp_endpoint` is the collector of its
    traces, if any. Raises ConfigurationError and AddressInUseError."""

    def __init__(
        self,
        node: StorageNode,
        repair: RepairWorker,
        *,
        host: str | None,
        port: int | None = None,
        security: Security = INSECURE,
        otlp_endpoint: str | None = None,
    ) -> None:
        self._tracing = None if otlp_endpoint is None else NodeTracing(otlp_endpoint, node.node_id)
        host = host or _ray_address()
        tls = security.server_tls()
        self._access = access = security.access()
        self._experiments = Experiments(node) if isinstance(node, SlowNode) else None
        large = LargeRequests()
        self._bulk = serve_bulk(
            node,
            host=host,
            port=0 if port is None else port + 1,
            tls=tls,
            source=self._experiments,
            large=large,
            access=access,
            tracing=self._tracing,
        )
        self.bulk_address = self._bulk.address
        try:
            self._grpc = serve_storage(
                node,
                host=host,
                port=port or 0,
                bulk_endpoint=self.bulk_address,
                repair=repair,
                experiments=self._experiments,
                large=large,
                access=access,
                tls=tls,
                tracing=self._tracing,
            )
        except AddressInUseError:
            self._bulk.stop(0)
            raise
        self.address = self._grpc.address
        access.start()

    def stop(self, grace_s: float = 1.0) -> None:
        if self._experiments is not None:
            self._experiments.end()  # otherwise requests that wait under a limit would not end in time
        self._grpc.stop(grace_s)
        self._bulk.stop(grace_s)
        self._access.stop()
        if self._tracing is not None:
            self._tracing.close()


def _ray_address() -> str:
    import ray.util

    return str(ray.util.get_node_ip_address())
