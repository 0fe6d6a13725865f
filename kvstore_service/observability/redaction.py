"""Removes secrets from text that leaves a machine."""

import os
import re
from collections.abc import Iterable
from pathlib import Path

from pydantic import SecretStr

from kvstore_client.settings import settings_by_name
from kvstore_service.settings import PREFIX, Settings

REMOVED = "[removed]"
_SHORTEST = 4
"""A shorter secret is not looked for in text: it would remove ordinary words."""
_MOST_FILE_BYTES = 4096
_PATTERNS = (
    re.compile(r"kvs_[0-9a-f]+_[0-9a-f]{16,}"),  # tokens of `kvstore credentials`
    re.compile(r"(?i)(?<=bearer )\S+"),
    re.compile(r"(?<=://)[^/@\s\"']+(?=@)"),  # user and password of a URL
)
_TELLING = re.compile(r"(?i)token|salt|secret|password|passwd|redis|key$|credential")
"""Names of variables whose value may be a secret."""


class Redaction:
    """Removes the secrets of this process's environment, and whatever looks like one, from text."""

    def __init__(self, extra: Iterable[str] = ()) -> None:
        found = {*_secrets_of_environment(), *extra}
        self._secrets = sorted((one for one in found if len(one) >= _SHORTEST), key=len, reverse=True)

    def of(self, text: str) -> str:
        """The text without secrets."""
        for secret in self._secrets:
            text = text.replace(secret, REMOVED)
        for pattern in _PATTERNS:
            text = pattern.sub(REMOVED, text)
        return text


def shown_environment() -> dict[str, str]:
    """The KVSTORE_* variables: values of those that are settings without secrets, and only the names of others."""
    secret = _secret_names()
    known = {f"{PREFIX}{name.upper()}" for name in Settings.model_fields}
    known |= {setting.variable for setting in settings_by_name().values()}
    return {
        name: value if name.upper() in known - secret and not _TELLING.search(name) else REMOVED
        for name, value in sorted(os.environ.items())
        if name.upper().startswith(PREFIX)
    }


def _secret_names() -> set[str]:
    """Variables of settings that are declared as secret."""
    service = {
        f"{PREFIX}{name.upper()}"
        for name, field in Settings.model_fields.items()
        if SecretStr in (field.annotation, *getattr(field.annotation, "__args__", ()))
    }
    client = {
        setting.variable for setting in settings_by_name().values() if setting.info.annotation is SecretStr
    }
    return service | client


def _secrets_of_environment() -> set[str]:
    found = set()
    secret = _secret_names()
    for name, value in os.environ.items():
        if not name.upper().startswith(PREFIX) or not value:
            continue
        if name.upper() in secret or (_TELLING.search(name) and not Path(value).exists()):
            found.add(value)
        elif name.upper().endswith("_FILE"):
            found |= _secret_in(Path(value))
    return found


def _secret_in(path: Path) -> set[str]:
    try:
        with path.open("rb") as file:
            text = file.read(_MOST_FILE_BYTES).decode(errors="replace").strip()
    except OSError:
        return set()
    return {text} if text else set()
