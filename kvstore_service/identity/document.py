"""The text format of a set of credentials: JSON with a format name and a version.

    {"format": "kvstore-credentials", "version": 1, "credentials": [
      {"id": "5f3a...", "name": "worker", "tenant": "acme", "scopes": ["data"], "created": "2026-07-01T12:00:00Z",
       "expires": "2026-10-01T12:00:00Z", "token_sha256": "9b1c..."}]}

A credential has `token_sha256`, the SHA-256 digest of its whole token, or `subject`. Without `expires` it does not
expire. The tenant `*` stands for every tenant. Unknown fields are refused: a misspelt `expires` would otherwise make a
credential that never expires.
"""

import json
import math
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Any

from kvstore_codec import bounded
from kvstore_codec.errors import ConfigurationError
from kvstore_service.identity.caller import ALL_TENANTS, Scope
from kvstore_service.identity.credential import Credential

MAX_DOCUMENT_BYTES = 64 << 20
"""Room for 200,000 credentials."""
_FEWEST_VALUES, _BYTES_OF_VALUE = 64, 12
"""A document of more and shorter values is refused. The shortest credential has 14 bytes for each of its values."""
_NAME, _VERSION = "kvstore-credentials", 1
_REQUIRED = {"id", "name", "tenant", "scopes"}
_OPTIONAL = {"created", "expires", "token_sha256", "subject"}


def write_document(credentials: Iterable[Credential]) -> str:
    content = [fields(credential) for credential in credentials]
    return json.dumps({"format": _NAME, "version": _VERSION, "credentials": content}, indent=1) + "\n"


def read_document(text: str) -> list[Credential]:
    """Parses a document. Raises ConfigurationError, whose text names the entry but quotes no value of it."""
    try:
        document = bounded.loads(text, _FEWEST_VALUES + len(text) // _BYTES_OF_VALUE)
    except ValueError:  # the error may quote the text
        raise ConfigurationError("it is not JSON") from None
    if not isinstance(document, dict) or document.get("format") != _NAME:
        raise ConfigurationError(f"its format is not {_NAME}")
    if document.get("version") != _VERSION:
        raise ConfigurationError(f"this release reads {_NAME} version {_VERSION}; update the service")
    entries = document.get("credentials")
    if document.keys() != {"format", "version", "credentials"} or not isinstance(entries, list):
        raise ConfigurationError(
            "besides format and version it must have a list named credentials, and nothing else"
        )
    return [_parsed(entry, number) for number, entry in enumerate(entries)]


def _parsed(entry: Any, number: int) -> Credential:
    where = f"credential {number + 1}"
    if not isinstance(entry, dict) or not _REQUIRED <= entry.keys() <= _REQUIRED | _OPTIONAL:
        raise ConfigurationError(
            f"{where} must have the fields {', '.join(sorted(_REQUIRED))}, may have "
            f"{', '.join(sorted(_OPTIONAL))}, and no other"
        )
    scopes = entry.pop("scopes")
    if not isinstance(scopes, list) or not all(
        isinstance(value, str) for value in (*scopes, *entry.values())
    ):
        raise ConfigurationError(f"the scopes of {where} must be a list of texts, and its other fields texts")
    try:
        digest = bytes.fromhex(entry["token_sha256"]) if "token_sha256" in entry else None
        return Credential(
            entry["id"],
            entry["name"],
            None if entry["tenant"] == ALL_TENANTS else entry["tenant"],
            frozenset(map(Scope, scopes)),
            digest,
            entry.get("subject"),
            _unix_s(entry["created"]) if "created" in entry else 0.0,
            _unix_s(entry["expires"]) if "expires" in entry else math.inf,
        )
    except ConfigurationError as error:
        raise ConfigurationError(f"{where}: {error}") from None
    except ValueError:
        raise ConfigurationError(
            f"{where}: scopes are {', '.join(Scope)}, times are written 2026-07-01T12:00:00Z, and digests in "
            "hexadecimal digits"
        ) from None


def fields(credential: Credential) -> dict[str, Any]:
    """The entry of a credential in a document."""
    shown: dict[str, Any] = {
        "id": credential.id,
        "name": credential.name,
        "tenant": ALL_TENANTS if credential.tenant is None else credential.tenant,
        "scopes": sorted(credential.scopes),
    }
    if credential.created_unix_s:
        shown["created"] = _as_text(credential.created_unix_s)
    if credential.expires_unix_s != math.inf:
        shown["expires"] = _as_text(credential.expires_unix_s)
    if credential.token_digest is not None:
        shown["token_sha256"] = credential.token_digest.hex()
    if credential.subject is not None:
        shown["subject"] = credential.subject
    return shown


def _as_text(unix_s: float) -> str:
    """A time in UTC, such as 2026-07-01T12:00:00Z."""
    return datetime.fromtimestamp(unix_s, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _unix_s(text: str) -> float:
    """Raises ValueError for text that is not a time with a time zone."""
    time = datetime.fromisoformat(text)
    if time.tzinfo is None:
        raise ValueError
    return time.timestamp()
