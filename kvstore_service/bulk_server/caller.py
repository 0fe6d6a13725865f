"""The caller of one connection to the bulk port."""

import time
from collections.abc import Callable, Sequence
from contextlib import suppress

from kvstore_codec.errors import RequestError
from kvstore_service.identity import Access, Caller
from kvstore_service.identity.verbs import STORAGE, VERBS

_READ = VERBS[f"/{STORAGE}/Read"]


class BulkCaller:
    """Identified once for each connection, by its token, or else by its certificate. A request costs one comparison,
    unless the credentials have changed since the last one."""

    def __init__(self, access: Access, certificate_names: Callable[[], Sequence[str]]) -> None:
        """`certificate_names` returns the names in the client's verified certificate."""
        self._access, self._certificate_names = access, certificate_names
        self._caller: Caller | None = None
        self._changes = -1  # when the caller was last confirmed

    @property
    def is_known(self) -> bool:
        """Whether the caller is identified, or need not be."""
        return self._caller is not None or self._access.is_open

    @property
    def share(self) -> str:
        """The tenant whose share of the places its connection takes. Empty where callers are not identified."""
        return "" if self._caller is None else self._caller.share

    def recognise(self) -> None:
        """Identifies the caller by its certificate, if that is a credential."""
        if self._access.knows_certificates:
            with suppress(RequestError):
                self.require()

    def present(self, token: bytes | bytearray) -> None:
        """Identifies the caller by its token. Raises UnauthenticatedError, PermissionDeniedError."""
        if self._access.is_open:
            return
        changes = self._access.changes
        self._admit(self._access.of_token(token.decode(errors="replace")), changes)

    def require(self) -> None:
        """Raises UnauthenticatedError or PermissionDeniedError unless the caller may read and store."""
        if self._access.is_open:
            return
        changes = self._access.changes
        if self._caller is None:
            self._admit(self._access.of_certificate(self._certificate_names()), changes)
        elif changes != self._changes or self._caller.expires_unix_s <= time.time():
            self._admit(self._access.confirm(self._caller), changes)

    def acting_for(self, tenant: str) -> str:
        """The tenant that a request acts for, if it names `tenant`. Raises PermissionDeniedError."""
        return tenant if self._caller is None else self._caller.acting_for(tenant)

    def _admit(self, caller: Caller, changes: int) -> None:
        _READ.require(caller)
        self._caller, self._changes = caller, changes
