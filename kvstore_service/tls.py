"""TLS of the servers: one certificate for every port of a process, read again when its files change."""

import logging
import ssl
import threading
from dataclasses import dataclass
from pathlib import Path

import grpc

from kvstore_client.file_stamp import FileStamp, stamp_of
from kvstore_codec.errors import ConfigurationError

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """PEM files: the certificate chain, its private key without a password, and, for TLS in both directions, the
    certificates of the authorities of which clients must present a certificate."""

    certificate: Path
    key: Path
    client_ca: Path | None = None


@dataclass(frozen=True, slots=True)
class _Loaded:
    """What is in effect for new connections."""

    stamp: FileStamp
    context: ssl.SSLContext
    certificate: grpc.ServerCertificateConfiguration


class ServerTls:
    """Thread-safe. A connection takes the certificate of the time at which it begins. Files that have become unusable,
    such as a new certificate before its key, are logged once, and the last good ones stay in effect. Raises
    ConfigurationError when they are unusable at first."""

    def __init__(self, files: TlsFiles) -> None:
        self._files = files
        self._lock = threading.Lock()
        self._loaded = _load(files)
        self._seen = self._loaded.stamp

    def context(self) -> ssl.SSLContext:
        """For a new connection to a port of this process."""
        return self._current().context

    def grpc_credentials(self) -> grpc.ServerCredentials:
        """For a gRPC port of this process. They follow the files for as long as the port is open."""
        given = self._current()

        def newer() -> grpc.ServerCertificateConfiguration | None:
            """Called for each connection."""
            nonlocal given
            if (found := self._current()) is given:
                return None
            given = found
            return found.certificate

        return grpc.dynamic_ssl_server_credentials(
            given.certificate, newer, require_client_authentication=self._files.client_ca is not None
        )

    def _current(self) -> _Loaded:
        stamp = _stamp(self._files)
        if stamp != self._seen:
            with self._lock:
                if stamp != self._seen:
                    self._seen = stamp
                    try:
                        self._loaded = _load(self._files)
                    except ConfigurationError as error:
                        log.error("%s. The ones that were read before stay in effect", error)  # noqa: TRY400
                    else:
                        log.info("a new certificate is in effect from %s", self._files.certificate)
        return self._loaded


def _stamp(files: TlsFiles) -> FileStamp:
    return stamp_of(files.certificate, files.key, files.client_ca)


def _load(files: TlsFiles) -> _Loaded:
    """Raises ConfigurationError."""
    stamp = _stamp(files)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_cert_chain(files.certificate, files.key, password=_no_password)
        pair = files.key.read_bytes(), files.certificate.read_bytes()
    except (OSError, ValueError) as error:
        raise ConfigurationError(
            f"cannot use TLS with the certificate {files.certificate} and the key {files.key}: {error}; both must be "
            "PEM files that belong together, and the key must have no password"
        ) from error
    roots = None
    if files.client_ca is not None:
        try:
            context.load_verify_locations(files.client_ca)
            context.verify_mode = ssl.CERT_REQUIRED
            roots = files.client_ca.read_bytes()
        except (OSError, ValueError) as error:
            raise ConfigurationError(
                f"cannot use TLS: {files.client_ca} is not a PEM file with certificates ({error})"
            ) from error
    return _Loaded(stamp, context, grpc.ssl_server_certificate_configuration([pair], roots))


def _no_password() -> str:
    """Instead of a question on the terminal, which a service would wait for."""
    raise ValueError("the key has a password")
