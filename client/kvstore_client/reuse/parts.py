"""What all calls of a session share."""

from dataclasses import dataclass

from kvstore_client.client import KVStoreClient
from kvstore_client.planning import Costs
from kvstore_client.reuse.engine import Engine
from kvstore_client.reuse.store_policy import StorePolicy


@dataclass(frozen=True, slots=True)
class SessionParts:
    """An engine, the client it reuses with, and what is known and decided for both."""

    client: KVStoreClient
    engine: Engine
    costs: Costs | None
    """What planning goes by; None when nothing is planned."""
    storing: StorePolicy
