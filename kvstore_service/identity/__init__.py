"""Who calls the service, and what each caller may do (docs/security.md)."""

from kvstore_service.identity.access import OPEN, Access
from kvstore_service.identity.caller import ALL_TENANTS, Caller, Scope
from kvstore_service.identity.credential import Credential, new_token
from kvstore_service.identity.credentials import Credentials
from kvstore_service.identity.file import CredentialFile

__all__ = [
    "ALL_TENANTS",
    "OPEN",
    "Access",
    "Caller",
    "Credential",
    "CredentialFile",
    "Credentials",
    "Scope",
    "new_token",
]
