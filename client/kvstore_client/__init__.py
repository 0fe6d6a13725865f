"""The SDK of the KV cache service, for use inside an inference worker."""

from kvstore_client.client import KVStoreClient, connect
from kvstore_client.settings import ClientSettings

__all__ = ["ClientSettings", "KVStoreClient", "connect"]
