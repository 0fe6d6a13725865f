"""Who may call the servers of a process."""

from collections.abc import Callable, Iterable, Sequence

import grpc

from kvstore_codec.errors import UnauthenticatedError
from kvstore_service.identity.caller import Caller, Scope
from kvstore_service.identity.credential import Credential, token_digest, token_id
from kvstore_service.identity.credentials import Credentials
from kvstore_service.identity.file import CredentialFile

NO_CREDENTIAL = (
    "this service needs a credential: set KVSTORE_TOKEN or KVSTORE_TOKEN_FILE to a token that an operator made with "
    "`kvstore credentials add`"
)
_BEARER = "bearer "


class Access:
    """Identifies callers by the credentials of a file, and the nodes of the cluster by their token `node_token`.
    Without a file everybody may call everything, and nobody is identified. `certificates` says whether the ports verify
    certificates of clients; without it none identifies a caller. Thread-safe."""

    def __init__(
        self, file: CredentialFile | None = None, node_token: str = "", *, certificates: bool = False
    ) -> None:
        self._file = file
        self._certificates = certificates
        self._node_id = token_id(node_token)
        self._nodes = Credentials([_node_credential(node_token)] if node_token else [])

    def start(self) -> None:
        """Starts to look for changes of the file."""
        if self._file is not None:
            self._file.start()

    def stop(self) -> None:
        if self._file is not None:
            self._file.stop()

    @property
    def is_open(self) -> bool:
        """Whether everybody may call everything."""
        return self._file is None

    @property
    def changes(self) -> int:
        """Number of times that the credentials have changed."""
        return 0 if self._file is None else self._file.changes

    @property
    def knows_certificates(self) -> bool:
        """Whether a certificate may identify a caller."""
        return self._certificates and self._file is not None and self._file.current.have_subjects

    def of_token(self, token: str) -> Caller:
        """Raises UnauthenticatedError."""
        return self._set_of(token_id(token)).of_token(token)

    def of_call(self, context: grpc.ServicerContext) -> Caller:
        """The caller of a gRPC call, by its token, or else by its certificate. Raises UnauthenticatedError."""
        token = bearer_token(context.invocation_metadata())
        return (
            self.of_token(token) if token is not None else self.of_certificate(_names(context.auth_context()))
        )

    def of_certificate(self, names: Sequence[str]) -> Caller:
        """The caller whose certificate has these names. Raises UnauthenticatedError."""
        if self._file is None or not self._certificates or not names:
            raise UnauthenticatedError(NO_CREDENTIAL)
        return self._file.current.of_certificate(names)

    def confirm(self, caller: Caller) -> Caller:
        """The caller by its credential as it is now. Raises UnauthenticatedError."""
        return self._set_of(caller.credential_id).confirm(caller)

    def tenant(self, context: grpc.ServicerContext, asked: str) -> str:
        """The tenant that a call acts for, if its request names the tenant `asked`. Raises UnauthenticatedError and
        PermissionDeniedError."""
        return self.acting(context)(asked)

    def acting(self, context: grpc.ServicerContext) -> Callable[[str], str]:
        """Returns the tenant that a part of a call acts for, from the tenant that the part names, as `tenant` does. For
        calls of many parts; each part is refused once the credential has expired or was revoked. Raises
        UnauthenticatedError."""
        if self._file is None:
            return as_asked
        caller = self.of_call(context)
        return lambda asked: self.confirm(caller).acting_for(asked)

    def tenant_or_all(self, context: grpc.ServicerContext, asked: str | None) -> str | None:
        """Like `tenant`, for a call that may act for every tenant: None if the request names no tenant and the caller
        is not of one tenant."""
        if self._file is None:
            return asked
        caller = self.of_call(context)
        return None if asked is None and caller.tenant is None else caller.acting_for(asked or "")

    def own_tenant(self, context: grpc.ServicerContext) -> str | None:
        """The tenant of the caller. None for a caller of every tenant, and where callers are not identified."""
        return None if self._file is None else self.of_call(context).tenant

    def whose(self, context: grpc.ServicerContext) -> str:
        """The tenant whose share of a limit a call takes. Raises UnauthenticatedError."""
        return self.of_call(context).share

    def namespace(self, context: grpc.ServicerContext, asked: str) -> str:
        """Like `tenant`, for what all tenants of a service without credentials share: then it is the default
        tenant's."""
        return "" if self._file is None else self.tenant(context, asked)

    def _set_of(self, credential_id: str) -> Credentials:
        if self._file is None or (credential_id and credential_id == self._node_id):
            return self._nodes
        return self._file.current


def as_asked(tenant: str) -> str:
    """The tenant that a request acts for where callers are not identified: the one that it names."""
    return tenant


OPEN = Access()
"""Everybody may call everything."""


def bearer_token(metadata: Iterable[tuple[str, str | bytes]]) -> str | None:
    """The token in the metadata of a call. None when there is none."""
    for key, value in metadata:
        if key == "authorization" and isinstance(value, str) and value[: len(_BEARER)].lower() == _BEARER:
            return value[len(_BEARER) :]
    return None


def _names(auth_context: dict[str, Iterable[bytes]]) -> list[str]:
    """The names in a client's verified certificate: its common name, then its alternative names."""
    return [
        value.decode(errors="replace")
        for key in ("x509_common_name", "x509_subject_alternative_name")
        for value in auth_context.get(key, ())
    ]


def _node_credential(token: str) -> Credential:
    return Credential(
        token_id(token), "a-node-of-this-cluster", None, frozenset({Scope.NODE}), token_digest(token)
    )
