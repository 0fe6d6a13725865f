"""What each call needs: the table that docs/security.md shows."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from kvstore_codec.errors import PermissionDeniedError
from kvstore_service.identity.caller import ALL_TENANTS, Caller, Scope

STORAGE, COORDINATOR = "kvstore.v1.Storage", "kvstore.v1.Coordinator"
REFLECTION, HEALTH = "grpc.reflection.v1alpha.ServerReflection", "grpc.health.v1.Health"


@dataclass(frozen=True, slots=True)
class Verb:
    """One call. A caller needs one of `scopes`. With `every_tenant` the call acts on, or tells of, the chunks of all
    tenants, and needs a credential for every tenant; otherwise it acts only for the caller's tenant."""

    name: str
    scopes: frozenset[Scope]
    every_tenant: bool = False

    def require(self, caller: Caller) -> None:
        """Raises PermissionDeniedError unless the caller may call it."""
        if not caller.scopes & self.scopes:
            raise PermissionDeniedError(
                f"{self.name} needs a credential with the scope {' or '.join(sorted(self.scopes))}; "
                f"{caller.name} has {', '.join(sorted(caller.scopes))}"
            )
        if self.every_tenant and caller.tenant is not None:
            raise PermissionDeniedError(
                f"{self.name} concerns every tenant, so it needs a credential for the tenant {ALL_TENANTS}; "
                f"{caller.name} is of one tenant"
            )


def _verbs(service: str, names: Iterable[str], *scopes: Scope, every_tenant: bool = False) -> dict[str, Verb]:
    return {f"/{service}/{name}": Verb(name, frozenset(scopes), every_tenant) for name in names}


_DATA, _ADMIN, _NODE, _METRICS = Scope.DATA, Scope.ADMIN, Scope.NODE, Scope.METRICS

VERBS: Mapping[str, Verb] = {
    **_verbs(STORAGE, ("Lookup", "Put"), _DATA, _NODE),
    **_verbs(STORAGE, ("Read", "RenewLease", "ReleaseLease", "Use", "Report"), _DATA),
    **_verbs(STORAGE, ("Delete", "List"), _DATA, _ADMIN),
    **_verbs(STORAGE, ("Verify", "Usage"), _ADMIN),
    **_verbs(STORAGE, ("Stats",), _ADMIN, _NODE, _METRICS, every_tenant=True),
    **_verbs(STORAGE, ("Throttle",), _ADMIN, every_tenant=True),
    **_verbs(STORAGE, ("Logs",), _ADMIN, _NODE, every_tenant=True),
    **_verbs(COORDINATOR, ("Logs",), _ADMIN, _NODE, every_tenant=True),
    **_verbs(COORDINATOR, ("Membership",), _DATA, _ADMIN, _NODE),
    **_verbs(COORDINATOR, ("Events", "Predict"), _DATA, _ADMIN),
    **_verbs(COORDINATOR, ("ClusterStats",), _ADMIN, _NODE, _METRICS, every_tenant=True),
    # Workers of all tenants decode with the newest calibration of their model.
    **_verbs(COORDINATOR, ("PutCalibration",), _ADMIN, every_tenant=True),
    **_verbs(COORDINATOR, ("GetCalibration", "FindCalibration"), _DATA, _ADMIN),
    **_verbs(COORDINATOR, ("ListCalibrations",), _DATA, _ADMIN, _NODE),
    **_verbs(COORDINATOR, ("GetCanary", "PutCanary", "ReportRefusal", "ReportFetch"), _DATA),
    **_verbs(COORDINATOR, ("ListModels",), _ADMIN, _NODE),
    **_verbs(COORDINATOR, ("ReplaceCanary",), _ADMIN),
    **_verbs(COORDINATOR, ("Pin", "ListPins", "ListQuotas", "ForgetTenant"), _ADMIN),
    **_verbs(COORDINATOR, ("SetQuota", "Repair"), _ADMIN, every_tenant=True),
    # The machine of a node that is about to stop drains it.
    **_verbs(COORDINATOR, ("Drain",), _ADMIN, _NODE, every_tenant=True),
    **_verbs(REFLECTION, ("ServerReflectionInfo",), *Scope),
    # A watch lasts as long as its client wants, and strangers could have many.
    **_verbs(HEALTH, ("Watch",), *Scope),
}
"""Every call of the service, by its full name. What is not here is refused, except the check of a server's health. That
says only whether the server works: probes of orchestrators have no credential."""

METRICS = Verb("GET /metrics", frozenset({_ADMIN, _METRICS}), every_tenant=True)


def is_open(method: str) -> bool:
    """Whether the call needs no credential."""
    return method == f"/{HEALTH}/Check"
