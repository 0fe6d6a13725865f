"""vLLM: its connector, and the paged KV memory of its workers."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvstore_client.engines.vllm.connector import KVStoreConnector

__all__ = ["KVStoreConnector"]


def __getattr__(name: str) -> object:
    """vLLM takes the connector from this module by name. Nothing else here needs vLLM."""
    if name == "KVStoreConnector":
        from kvstore_client.engines.vllm.connector import KVStoreConnector

        return KVStoreConnector
    raise AttributeError(name)
