"""Metadata of canaries, and the interface of a mirror for their copies."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from kvstore_codec import canonical

KEY = r"(?:01)?[0-9a-f]{64}"
"""Pattern of a key in hexadecimal digits."""
_TENANT_KEY = b"\1"
_TENANT_DOMAIN = b"kvstore.canary-of-tenant.v1"
MAX_TEXT_BYTES = 256
"""Limit of each text in an Origin."""


@dataclass(frozen=True, slots=True)
class Origin:
    """Description of a worker, as the worker reports it."""

    model_id: str = ""
    host: str = ""
    pid: int = 0
    software: str = ""
    """Names and versions, such as `torch 2.13.0, transformers 5.23.0`."""
    device: str = ""
    dtype: str = ""


@dataclass(frozen=True, slots=True)
class CanaryRecord:
    """Metadata of a model's canary. `model_digest` has 32 bytes."""

    model_digest: bytes
    generation: int
    """Number of the canary. Every new canary of a model has another one. It is part of the chunks' identity."""
    origin: Origin = Origin()
    created_unix_s: float = 0.0
    size_bytes: int = 0
    """Size of the KV in bytes. 0 means that the model has no canary now; its next worker computes one."""
    client: str = ""
    """Address of the client that put the canary, as seen by the coordinator. With credentials, its tenant."""
    tenant: str = ""
    """The tenant whose workers compare with it. Without credentials there is only the default tenant's."""

    @property
    def key(self) -> bytes:
        """Identifies the model and the tenant."""
        return canary_key(self.model_digest, self.tenant)


def canary_key(model_digest: bytes, tenant: str) -> bytes:
    """Identifies a tenant's canary of a model: the model's digest for the default tenant. Keys of other tenants are
    longer, so no choice of a digest makes one of them."""
    if not tenant:
        return model_digest
    return _TENANT_KEY + canonical.digest(_TENANT_DOMAIN, tenant.encode(), model_digest)


@dataclass(frozen=True, slots=True)
class Refusal:
    """A report of a worker whose KV differs from the canary, and which therefore reuses no chunks."""

    origin: Origin
    generation: int
    message: str
    last_unix_s: float
    times: int = 1


class CanaryMirror(Protocol):
    """Stores copies of canaries outside the coordinator's disk. Every method raises CatalogueError when the copies
    cannot be reached."""

    def keep(self, key: bytes, generation: int, content: bytes) -> None:
        """Stores a copy, which replaces the previous one of this key (`CanaryRecord.key`)."""

    def forget(self, key: bytes) -> None: ...

    def copies(self) -> Iterator[tuple[bytes, int, bytes]]:
        """Yields (key, generation, content) of every copy, unverified."""
