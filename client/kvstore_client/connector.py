"""Opens connections to a cluster's servers: with the client's token, and over TLS."""

import ssl
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import grpc

from kvstore_client.reloaded_files import ReloadedFiles
from kvstore_client.request_id import METADATA_KEY, current_request_id
from kvstore_client.settings import SecuritySettings
from kvstore_client.settings.security import plain_token
from kvstore_codec.errors import ConfigurationError

_MOST_FILE_BYTES = 4096
_NO_PROXY = ("grpc.enable_http_proxy", 0)
_END_OF_CERTIFICATE = b"-----END CERTIFICATE-----"


class _Loaded(NamedTuple):
    """What the files contained when they were read."""

    token: str
    context: ssl.SSLContext | None
    credentials: grpc.ChannelCredentials | None


class Connector:
    """Thread-safe. Files that become unusable are logged once, and their last good content stays in use. Raises
    ConfigurationError when they are unusable at first."""

    def __init__(
        self,
        settings: SecuritySettings = SecuritySettings(),  # noqa: B008 (immutable)
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._settings = settings
        files = (settings.token_file, settings.tls_ca, settings.tls_cert, settings.tls_key)
        self._files = ReloadedFiles(files, partial(_load, settings), clock)

    @property
    def uses_tls(self) -> bool:
        return self._settings.uses_tls

    @property
    def changes(self) -> int:
        """Number of times that the files have changed. A channel that was opened before the last change proves the
        client by the files as they were then."""
        return self._files.changes

    def token(self) -> str:
        """The client's token as it is now. Empty without one."""
        return self._files.current.token

    def tls_context(self) -> ssl.SSLContext | None:
        """For a new connection to a bulk port. None without TLS."""
        return self._files.current.context

    def server_name(self, host: str) -> str:
        """The name that the certificate of a server must have, if the server's host is `host`."""
        return self._settings.tls_name or host

    def channel(self, address: str, options: Sequence[tuple[str, Any]] = ()) -> grpc.Channel:
        """A gRPC channel, whose calls show the token. It uses no HTTP proxy: they seldom carry gRPC."""
        options = [_NO_PROXY, *options]
        credentials = self._files.current.credentials
        if credentials is None:
            channel = grpc.insecure_channel(address, options)
        else:
            name = self._settings.tls_name
            named = (
                [("grpc.ssl_target_name_override", name), ("grpc.default_authority", name)] if name else []
            )
            channel = grpc.secure_channel(address, credentials, [*options, *named])
        has_token = self._settings.token_file is not None or self._files.current.token
        return grpc.intercept_channel(channel, _Metadata(self.token if has_token else None))


class _Details(NamedTuple):
    """Details of a call. gRPC takes those that are not here from the call itself."""

    method: str
    timeout: float | None
    metadata: list[tuple[str, str]]
    credentials: grpc.CallCredentials | None


class _Metadata(
    grpc.UnaryUnaryClientInterceptor,  # type: ignore[misc]  # grpc is not typed
    grpc.UnaryStreamClientInterceptor,  # type: ignore[misc]
    grpc.StreamUnaryClientInterceptor,  # type: ignore[misc]
    grpc.StreamStreamClientInterceptor,  # type: ignore[misc]
):
    """Adds the token, if there is one, and the id of the request to the metadata of each call."""

    def __init__(self, token: Callable[[], str] | None) -> None:
        self._token = token

    def _pass(self, call_on: Callable[[Any, Any], Any], details: Any, request: Any) -> Any:
        metadata = list(details.metadata or ())
        if self._token is not None:
            metadata.append(("authorization", f"Bearer {self._token()}"))
        if request_id := current_request_id():
            metadata.append((METADATA_KEY, request_id))
        return call_on(_Details(details.method, details.timeout, metadata, details.credentials), request)

    intercept_unary_unary = intercept_unary_stream = _pass
    intercept_stream_unary = intercept_stream_stream = _pass


def _load(settings: SecuritySettings) -> _Loaded:
    """Raises ConfigurationError."""
    token = settings.token.get_secret_value()
    if settings.token_file is not None:
        token = read_token(settings.token_file)
    if not settings.uses_tls:
        return _Loaded(token, None, None)
    certificate, key = settings.tls_cert, settings.tls_key
    try:
        root_bytes = _roots(settings)
        # Only the comments of a PEM file may have other characters than those of ASCII.
        roots = None if root_bytes is None else root_bytes.decode("ascii", "ignore")
        context = ssl.create_default_context(cadata=roots)
    except (OSError, ValueError) as error:
        raise ConfigurationError(
            f"tls_ca: {settings.tls_ca or certificate} is not a PEM file with certificates ({error})"
        ) from error
    # The file may contain a certificate that is not its own authority. gRPC accepts that, too.
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    if certificate is None or key is None:
        return _Loaded(token, context, grpc.ssl_channel_credentials(root_bytes))
    try:
        context.load_cert_chain(certificate, key, password=_no_password)
        pair = key.read_bytes(), certificate.read_bytes()
    except (OSError, ValueError) as error:
        raise ConfigurationError(
            f"cannot use the certificate {certificate} with the key {key}: {error}; both must be PEM files that belong "
            "together, and the key must have no password"
        ) from error
    return _Loaded(token, context, grpc.ssl_channel_credentials(root_bytes, *pair))


def _roots(settings: SecuritySettings) -> bytes | None:
    """The certificates that prove a server, PEM. None for those of the system. Without `tls_ca` it is the first one of
    `tls_cert`: those behind it may be of authorities that sign for others, too. Raises OSError."""
    if settings.tls_ca is not None:
        return settings.tls_ca.read_bytes()
    if settings.tls_cert is None:
        return None
    own, end, _ = settings.tls_cert.read_bytes().partition(_END_OF_CERTIFICATE)
    return own + end + b"\n"


def read_token(path: Path) -> str:
    """The token in a file. Raises ConfigurationError, which does not quote it."""
    try:
        with path.open("rb") as file:
            token = plain_token(file.read(_MOST_FILE_BYTES).decode(errors="replace"))
    except OSError as error:
        raise ConfigurationError(f"cannot read the token in {path}: {error.strerror}") from error
    except ValueError as error:
        raise ConfigurationError(f"{path} has no token: {error}") from error
    if not token:
        raise ConfigurationError(f"{path} has no token: it is empty")
    return token


def _no_password() -> str:
    """Instead of a question on the terminal."""
    raise ValueError("the key has a password")
