"""Transports: how KV bytes are read from and written to one storage node."""

from kvstore_client.transport.base import Memory, Places, PutStream, ReadStream, Transport
from kvstore_client.transport.bulk import BulkTransport
from kvstore_client.transport.connections import Connections
from kvstore_client.transport.grpc import GrpcTransport
from kvstore_client.transport.memory import ReceiveMemory
from kvstore_client.transport.transports import Transports

__all__ = [
    "BulkTransport",
    "Connections",
    "GrpcTransport",
    "Memory",
    "Places",
    "PutStream",
    "ReadStream",
    "ReceiveMemory",
    "Transport",
    "Transports",
]
