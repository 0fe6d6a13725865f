"""Certificates for a measurement over TLS, made with the openssl command."""

import subprocess
from pathlib import Path

from kvstore_client.settings import SecuritySettings
from kvstore_codec.errors import StartupError
from kvstore_service.security import Security
from kvstore_service.tls import TlsFiles

_NEW_KEY = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")


def make_certificates(folder: Path) -> None:
    """Writes an authority's certificate, and one that it signed for servers and clients at 127.0.0.1, with its key.
    Raises StartupError."""
    authority, extensions = folder / "authority.pem", folder / "extensions"
    request, key = folder / "request.csr", folder / "authority.key"
    extensions.write_text("subjectAltName=IP:127.0.0.1\nbasicConstraints=CA:FALSE\n")
    _openssl(
        *("req", "-x509", *_NEW_KEY, "-days", "2", "-subj", "/CN=bench-authority"),
        *("-out", str(authority), "-keyout", str(key)),
    )
    _openssl(
        *("req", *_NEW_KEY, "-subj", "/CN=bench", "-out", str(request), "-keyout", str(folder / "bench.key"))
    )
    _openssl(
        *("x509", "-req", "-in", str(request), "-CA", str(authority), "-CAkey", str(key), "-CAcreateserial"),
        *("-days", "2", "-extfile", str(extensions), "-out", str(folder / "bench.pem")),
    )


def of_server(folder: Path, *, mutual: bool) -> Security:
    """Of a server that uses these certificates, and asks clients for theirs if `mutual`."""
    authority = folder / "authority.pem"
    return Security(
        tls=TlsFiles(folder / "bench.pem", folder / "bench.key", authority if mutual else None), ca=authority
    )


def of_client(folder: Path, *, mutual: bool) -> SecuritySettings:
    """Of a client of such a server."""
    authority = folder / "authority.pem"
    if not mutual:
        return SecuritySettings(tls_ca=authority)
    return SecuritySettings(tls_ca=authority, tls_cert=folder / "bench.pem", tls_key=folder / "bench.key")


def _openssl(*arguments: str) -> None:
    try:
        subprocess.run(["openssl", *arguments], check=True, capture_output=True, timeout=60)  # noqa: S607
    except FileNotFoundError as error:
        raise StartupError("a measurement over TLS needs the openssl command") from error
