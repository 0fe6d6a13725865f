"""Selects the transport for each storage node."""

import threading
from collections.abc import Collection

import grpc

from kvstore_api.placement import Member
from kvstore_client.connector import Connector
from kvstore_client.settings import ClientSettings
from kvstore_client.transport.base import Transport
from kvstore_client.transport.bulk import BulkTransport
from kvstore_client.transport.connections import Connections
from kvstore_client.transport.grpc import GrpcTransport
from kvstore_client.transport.memory import ReceiveMemory


class Transports:
    """The bulk port of members that have one; gRPC for others, and while the port is unreachable. Thread-safe."""

    def __init__(self, settings: ClientSettings, connector: Connector) -> None:
        self._settings = settings
        self._connector = connector
        self._memory = ReceiveMemory()
        self._lock = threading.Lock()
        self._bulk: dict[str, tuple[Member, BulkTransport]] = {}  # by node_id

    def to(self, member: Member, channel: grpc.Channel) -> Transport:
        """The member's transport; `channel` leads to its gRPC endpoint."""
        if not self._reaches_bulk(member):
            return GrpcTransport(channel)
        with self._lock:
            known, transport = self._bulk.get(member.node_id, (None, None))
            if transport is None or known != member:
                if transport is not None:  # the node was restarted at another address
                    transport.close()
                transport = self._connect(member, channel)
                self._bulk[member.node_id] = member, transport
            return transport

    def keep(self, node_ids: Collection[str]) -> None:
        """Forget all other members and close their idle connections."""
        with self._lock:
            gone = [self._bulk.pop(node_id)[1] for node_id in self._bulk.keys() - set(node_ids)]
        for transport in gone:
            transport.close()

    def _reaches_bulk(self, member: Member) -> bool:
        """Whether to use the bulk port. Not where only the gRPC endpoint has a route, which is meant for all bytes."""
        routes = self._settings.transport.routes
        return bool(_port(member.bulk_endpoint)) and (
            member.endpoint not in routes or member.bulk_endpoint in routes
        )

    def _connect(self, member: Member, channel: grpc.Channel) -> BulkTransport:
        dial = self._settings.transport.routes.get(member.bulk_endpoint, member.bulk_endpoint)
        host = dial.rpartition(":")[0]
        name = member.bulk_endpoint.rpartition(":")[0].strip("[]")
        connections = Connections(
            host.strip("[]"),
            _port(dial),
            self._connector.tls_context,
            self._connector.server_name(name or member.node_id),
            token=self._connector.token,
        )
        return BulkTransport(connections, self._memory, GrpcTransport(channel))

    def leave_to_parent(self) -> None:
        """See ClusterView. Takes no lock: a thread of the parent may hold it."""
        for _, transport in self._bulk.values():
            transport.leave_to_parent()

    def close(self) -> None:
        """Close idle connections; users close the others."""
        with self._lock:
            transports = list(self._bulk.values())
            self._bulk.clear()
        for _, transport in transports:
            transport.close()


def _port(address: str) -> int:
    """Port of an address; 0 for an address without one."""
    port = address.rpartition(":")[2]
    return int(port) if port.isascii() and port.isdigit() and len(port) <= 5 and int(port) < 1 << 16 else 0
