"""Client SDK of the KV cache service, for use inside an inference worker."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvstore_client.client import KVStoreClient, connect
    from kvstore_client.request_id import request_scope
    from kvstore_client.settings import ClientSettings

__all__ = ["ClientSettings", "KVStoreClient", "connect", "request_scope"]


def __getattr__(name: str) -> object:
    """Import public names on first use: storage nodes use `kvstore_client.transport` and must not import torch."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name == "request_scope":
        from kvstore_client.request_id import request_scope

        return request_scope
    from kvstore_client import client, settings

    return getattr(settings if name == "ClientSettings" else client, name)
