"""The bulk port of a storage node: KV bytes over TCP or TLS, directly between the socket and the node's memory."""

from kvstore_service.bulk_server.server import BulkServer, serve_bulk

__all__ = ["BulkServer", "serve_bulk"]
