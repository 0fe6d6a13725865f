"""A set of credentials, and the check of what a caller presents."""

import hmac
import time
from collections.abc import Callable, Iterable, Iterator, Sequence

from kvstore_api.frames import MAX_TOKEN_BYTES
from kvstore_codec.errors import ConfigurationError, UnauthenticatedError
from kvstore_service.identity.caller import Caller
from kvstore_service.identity.credential import Credential, token_digest, token_id

_UNKNOWN = (
    "the credential is not valid here: its token is wrong or was revoked; ask an operator for one "
    "(`kvstore credentials add`)"
)
_NO_DIGEST = bytes(32)


class Credentials:
    """Immutable. `clock` returns unix time. Raises ConfigurationError when two credentials share an id or a subject."""

    def __init__(
        self, credentials: Iterable[Credential] = (), clock: Callable[[], float] = time.time
    ) -> None:
        self._all = tuple(credentials)
        self._clock = clock
        self._by_id = {credential.id: credential for credential in self._all}
        self._by_subject = {one.subject: one for one in self._all if one.subject is not None}
        if len(self._by_id) != len(self._all):
            raise ConfigurationError("two credentials have the same id")
        if len(self._by_subject) != sum(one.subject is not None for one in self._all):
            raise ConfigurationError("two credentials have the same subject")

    @property
    def have_subjects(self) -> bool:
        """Whether a certificate may identify a caller."""
        return bool(self._by_subject)

    def of_token(self, token: str) -> Caller:
        """The caller that has this token. Takes the same time for a wrong secret as for an unknown id, and compares
        digests in constant time. Raises UnauthenticatedError."""
        if len(token) > MAX_TOKEN_BYTES:
            raise UnauthenticatedError(_UNKNOWN)
        found = self._by_id.get(token_id(token))
        expected = _NO_DIGEST if found is None or found.token_digest is None else found.token_digest
        if not hmac.compare_digest(token_digest(token), expected) or found is None:
            raise UnauthenticatedError(_UNKNOWN)
        return self._unexpired(found)

    def of_certificate(self, subjects: Sequence[str]) -> Caller:
        """The caller whose verified certificate has these names: the first one that a credential names. Raises
        UnauthenticatedError."""
        for subject in subjects:
            if (found := self._by_subject.get(subject)) is not None:
                return self._unexpired(found)
        raise UnauthenticatedError(
            "no credential names the subject of this certificate; ask an operator for one "
            "(`kvstore credentials add --subject`)"
        )

    def confirm(self, caller: Caller) -> Caller:
        """The caller by its credential as it is now. Raises UnauthenticatedError when it has expired or was revoked, or
        when another token or subject has taken its place."""
        found = self._by_id.get(caller.credential_id)
        if found is None or not hmac.compare_digest(found.proof, caller.proof):
            raise UnauthenticatedError(_UNKNOWN)
        return self._unexpired(found)

    def __iter__(self) -> Iterator[Credential]:
        return iter(self._all)

    def __len__(self) -> int:
        return len(self._all)

    def _unexpired(self, credential: Credential) -> Caller:
        if credential.expires_unix_s <= self._clock():
            # Only who has the secret learns this, so it tells strangers nothing.
            raise UnauthenticatedError(
                f"the credential of {credential.name} has expired; ask an operator for a new one"
            )
        return credential.caller
