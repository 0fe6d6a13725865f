"""Parts that all calls of a session share."""

from dataclasses import dataclass

from kvstore_client.client import KVStoreClient
from kvstore_client.planning import Costs
from kvstore_client.reuse.engine import Engine
from kvstore_client.reuse.store_policy import StorePolicy


@dataclass(frozen=True, slots=True)
class SessionParts:
    """An engine, the client that it reuses KV with, the model's costs, and the store policy."""

    client: KVStoreClient
    engine: Engine
    costs: Costs | None
    """Costs for planning; None when fetches are not planned."""
    storing: StorePolicy
