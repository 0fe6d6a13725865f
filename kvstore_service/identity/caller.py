"""An identified caller."""

import math
from dataclasses import dataclass, field
from enum import StrEnum

from kvstore_codec.errors import PermissionDeniedError

ALL_TENANTS = "*"
"""How a credential names every tenant. No tenant may have this name."""


class Scope(StrEnum):
    """What a credential allows. A credential may have several scopes."""

    DATA = "data"
    """Look up, read, store, list and delete chunks of the credential's tenant. For inference workers."""
    ADMIN = "admin"
    """Operate: verify, pin, quotas, draining, repair, limits. For operators."""
    NODE = "node"
    """Copy chunks of every tenant between nodes. For the storage nodes themselves."""
    METRICS = "metrics"
    """Read the metrics and statistics of the cluster. For Prometheus and dashboards."""


@dataclass(frozen=True, slots=True)
class Caller:
    """A caller whose credential was verified, and expires at unix time `expires_unix_s`. A `tenant` of None stands for
    every tenant."""

    credential_id: str
    name: str
    tenant: str | None
    scopes: frozenset[Scope]
    expires_unix_s: float = math.inf
    proof: bytes = field(default=b"", repr=False)
    """SHA-256 digest of what the caller has shown: its token, or the subject of its certificate."""

    @property
    def share(self) -> str:
        """The tenant whose share of the service's limits the caller takes: its own, or ALL_TENANTS."""
        return ALL_TENANTS if self.tenant is None else self.tenant

    def acting_for(self, tenant: str) -> str:
        """The tenant that a request of this caller acts for, if it names `tenant`, or none by an empty text: then it
        acts for the caller's own tenant, and a caller of every tenant for the default tenant. Raises
        PermissionDeniedError for a tenant that is not the caller's."""
        if self.tenant is None or tenant == self.tenant:
            return tenant
        if tenant:
            raise PermissionDeniedError(
                f"the request names another tenant than the credential of {self.name} is for; leave KVSTORE_TENANT "
                "empty"
            )
        return self.tenant
