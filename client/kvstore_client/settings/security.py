"""How a client proves who it is, and how it knows the servers."""

from pathlib import Path
from typing import Self

from pydantic import SecretStr, ValidationError, field_validator, model_validator

from kvstore_api.frames import MAX_TOKEN_BYTES
from kvstore_client.cache_dir import expanded
from kvstore_client.settings.environment import PREFIX, from_environment
from kvstore_client.settings.group import SettingsGroup
from kvstore_codec.errors import ConfigurationError

_FILES = ("token_file", "tls_ca", "tls_cert", "tls_key", "signing_key_file")


class SecuritySettings(SettingsGroup):
    """The client's credential, and the TLS of its connections (docs/security.md). Files are read again when they
    change, so that they can be replaced while the client runs."""

    token: SecretStr = SecretStr("")
    """Token of the client's credential (`kvstore credentials add`), for a service that has credentials."""

    token_file: Path | None = None
    """File with the token, instead of `token`."""

    tls_ca: Path | None = None
    """PEM file of the authority that signed the servers' certificates. When given, all connections use TLS."""

    tls_cert: Path | None = None
    """PEM file with the client's certificate, for servers that ask for one. Without `tls_ca` the servers must have the
    same certificate."""

    tls_key: Path | None = None
    """PEM file with the key of `tls_cert`."""

    tls_name: str = ""
    """Name that the servers' certificates must have. Default: the host of their address."""

    signing_key_file: Path | None = None
    """File with the tenant's signing keys, one a line, each of 64 hexadecimal digits. The first one signs the chunks
    that this client stores. Chunks that none of them has signed are not used, and replaced. Default: chunks are not
    signed, and all are used."""

    @property
    def uses_tls(self) -> bool:
        """Whether all connections use TLS."""
        return self.tls_ca is not None or self.tls_cert is not None

    @field_validator("token")
    @classmethod
    def _is_token(cls, value: SecretStr) -> SecretStr:
        return SecretStr(plain_token(value.get_secret_value()))

    @field_validator(*_FILES, mode="before")
    @classmethod
    def _empty_is_none(cls, value: object) -> object:
        return None if value == "" else value

    @field_validator(*_FILES)
    @classmethod
    def _expand_home(cls, value: Path | None) -> Path | None:
        return None if value is None else expanded(value)

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("tls_cert and tls_key must be given together")
        return self


def security_from_environment() -> SecuritySettings:
    """The settings that `KVSTORE_*` variables give, for commands that are no clients of KV. Raises
    ConfigurationError."""
    try:
        return SecuritySettings.model_validate(from_environment(SecuritySettings.model_fields))
    except ValidationError as error:
        problems = "; ".join(_described(problem["loc"], problem["msg"]) for problem in error.errors())
        raise ConfigurationError(f"cannot use these settings: {problems}") from None


def plain_token(text: str) -> str:
    """The token in a text, without the white space around it. Raises ValueError, which does not quote it."""
    token = text.strip()
    if len(token) > MAX_TOKEN_BYTES or not (token.isascii() and token.isprintable()) or " " in token:
        raise ValueError(f"a token has at most {MAX_TOKEN_BYTES} ASCII characters and no space")
    return token


def _described(location: tuple[int | str, ...], message: str) -> str:
    return f"{PREFIX}{str(location[0]).upper()}: {message}" if location else message
