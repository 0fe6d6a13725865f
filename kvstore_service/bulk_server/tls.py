"""TLS settings of the bulk port."""

import ssl
from pathlib import Path

from kvstore_codec.errors import ConfigurationError


def server_tls(certificate: Path, key: Path) -> ssl.SSLContext:
    """TLS context from PEM files: the certificate chain, and its private key. Raises ConfigurationError."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_cert_chain(certificate, key)
    except (OSError, ValueError) as error:
        raise ConfigurationError(
            f"cannot use TLS with the certificate {certificate} and the key {key}: {error}; both must be PEM files "
            "that belong together, and the key must have no password"
        ) from error
    return context
