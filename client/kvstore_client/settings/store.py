"""How a client stores new chunks."""

from enum import StrEnum

from pydantic import Field

from kvstore_client.settings.group import SettingsGroup


class Durability(StrEnum):
    """What an acknowledged chunk survives: `default` what its node is configured for, `memory` nothing, `relaxed` the
    death of the process, `durable` a power loss. A node that cannot promise `durable` refuses the chunk."""

    DEFAULT = "default"
    MEMORY = "memory"
    RELAXED = "relaxed"
    DURABLE = "durable"


class StoreSettings(SettingsGroup):
    """How new chunks are stored, in the background."""

    tenant: str = ""
    """Tenant whose quota new chunks count against. Default: the tenant of the credential, or without one the tenant
    without a name. Only a credential for every tenant may name others."""

    ttl_s: int = Field(default=0, ge=0)
    """How long nodes keep new chunks, in seconds. 0: until they are evicted."""

    durability: Durability = Field(default=Durability.DEFAULT, alias="put_durability")
    """What an acknowledged chunk survives. `memory`: nothing. `relaxed`: the death of the node's process. `durable`: a
    power loss; a node that cannot promise it refuses the chunk. `default`: what the node is configured for."""

    backlog_bytes: int = Field(default=512 << 20, gt=0, alias="store_backlog_bytes")
    """KV that may wait to be stored. New chunks beyond it are dropped, so that memory does not grow."""

    idle_wait_s: float = Field(default=0.0, ge=0, alias="store_idle_wait_s")
    """How long storing waits before each new chunk for the engine to be idle, in seconds, where encoding and engine
    share a processor. It waits less the more of the backlog is taken, not at all from half of it on, and no longer than
    half of `put_timeout_s` after the chunk was queued. 0: not at all."""
