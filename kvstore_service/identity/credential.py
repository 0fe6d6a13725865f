"""A credential: the name, tenant and scopes of a caller, and what proves them. Only a digest of a token is kept."""

import hashlib
import math
import re
import secrets
from dataclasses import dataclass

from kvstore_cluster.names import MAX_TENANT_BYTES
from kvstore_codec.errors import ConfigurationError
from kvstore_service.identity.caller import ALL_TENANTS, Caller, Scope

MAX_NAME_CHARACTERS = 64
MAX_SUBJECT_CHARACTERS = 256

_KIND = "kvs"  # begins each token, so that scanners for leaked secrets can recognise one
_ID_BYTES, _SECRET_BYTES = 8, 32
_NAME = re.compile(rf"[A-Za-z0-9][A-Za-z0-9._@-]{{0,{MAX_NAME_CHARACTERS - 1}}}")
_ID = re.compile(rf"[0-9a-f]{{{2 * _ID_BYTES}}}")
_OF_EVERY_TENANT = frozenset({Scope.NODE, Scope.METRICS})


@dataclass(frozen=True, slots=True)
class Credential:
    """One credential of a caller. The caller proves it by the token whose SHA-256 digest is `token_digest`, or by a
    certificate with the subject `subject`: its common name, or one of its alternative names. A tenant of None stands
    for every tenant.

    The constructor raises ConfigurationError for values that no credential may have."""

    id: str
    name: str
    tenant: str | None
    scopes: frozenset[Scope]
    token_digest: bytes | None = None
    """32 bytes. A fast digest suffices, because the secret part of a token has 256 random bits."""
    subject: str | None = None
    created_unix_s: float = 0.0
    expires_unix_s: float = math.inf

    def __post_init__(self) -> None:
        if not _ID.fullmatch(self.id):
            raise ConfigurationError(f"the id of a credential has {2 * _ID_BYTES} hexadecimal digits")
        if not _NAME.fullmatch(self.name):
            raise ConfigurationError(
                f"the name of a credential has 1 to {MAX_NAME_CHARACTERS} letters, digits or . _ @ - and begins with a "
                "letter or digit"
            )
        if self.tenant is not None:
            require_tenant(self.tenant)
        if not self.scopes:
            raise ConfigurationError(f"a credential needs a scope: {', '.join(Scope)}")
        if (whole := self.scopes & _OF_EVERY_TENANT) and self.tenant is not None:
            raise ConfigurationError(
                f"a credential with the scope {' or '.join(sorted(whole))} serves every tenant; give it the tenant "
                f"{ALL_TENANTS}"
            )
        if (self.token_digest is None) == (self.subject is None):
            raise ConfigurationError("a credential has a token or the subject of a certificate")
        if self.token_digest is not None and len(self.token_digest) != hashlib.sha256().digest_size:
            raise ConfigurationError("the SHA-256 digest of a token has 64 hexadecimal digits")
        if self.subject is not None and not 0 < len(self.subject) <= MAX_SUBJECT_CHARACTERS:
            raise ConfigurationError(f"a subject has 1 to {MAX_SUBJECT_CHARACTERS} characters")

    @property
    def caller(self) -> Caller:
        return Caller(self.id, self.name, self.tenant, self.scopes, self.expires_unix_s, self.proof)

    @property
    def proof(self) -> bytes:
        """SHA-256 digest of the token or of the subject."""
        if self.token_digest is not None:
            return self.token_digest
        return hashlib.sha256((self.subject or "").encode(errors="replace")).digest()


def require_tenant(tenant: str) -> None:
    """Raises ConfigurationError for text that cannot be the name of a tenant."""
    if (
        tenant == ALL_TENANTS
        or len(tenant.encode(errors="replace")) > MAX_TENANT_BYTES
        or not tenant.isprintable()
    ):
        raise ConfigurationError(
            f"the name of a tenant has at most {MAX_TENANT_BYTES} bytes, all printable, and is not {ALL_TENANTS}"
        )


def new_token() -> tuple[str, str]:
    """(id, token) of a new credential. The token contains the id, which is not secret, and 256 random bits."""
    name = secrets.token_hex(_ID_BYTES)
    return name, f"{_KIND}_{name}_{secrets.token_hex(_SECRET_BYTES)}"


def new_id() -> str:
    """Id of a new credential without a token."""
    return secrets.token_hex(_ID_BYTES)


def token_id(token: str) -> str:
    """The id that a token claims. Empty when the text is not a token."""
    kind, _, rest = token.partition("_")
    claimed, _, secret = rest.partition("_")
    return claimed if kind == _KIND and secret and _ID.fullmatch(claimed) else ""


def token_digest(token: str) -> bytes:
    return hashlib.sha256(token.encode(errors="replace")).digest()
