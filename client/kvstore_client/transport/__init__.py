"""How KV bytes of one storage node are read and written."""

from kvstore_client.transport.base import PutStream, ReadStream, Transport
from kvstore_client.transport.grpc import GrpcTransport

__all__ = ["GrpcTransport", "PutStream", "ReadStream", "Transport"]
