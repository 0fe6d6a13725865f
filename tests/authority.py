"""A certificate authority for tests, made with the openssl command."""

import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

_NEW_KEY = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")


@dataclass(frozen=True)
class Pair:
    """A certificate and its key."""

    certificate: Path
    key: Path


class Authority:
    """Signs certificates. Its own is `certificate`."""

    def __init__(self, folder: Path, name: str = "authority") -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self.certificate, self._key = folder / f"{name}.pem", folder / f"{name}.key"
        _openssl(
            *("req", "-x509", *_NEW_KEY, "-days", "2", "-subj", f"/CN={name}"),
            *("-out", str(self.certificate), "-keyout", str(self._key)),
        )

    def sign(
        self, name: str, *, alternative: str = "IP:127.0.0.1", days: int = 2, file: str | None = None
    ) -> Pair:
        """A new certificate with the common name `name`. One of -1 days has expired. `file` names its files."""
        pair = Pair(self._folder / f"{file or name}.pem", self._folder / f"{file or name}.key")
        request, extensions = self._folder / "request.csr", self._folder / "extensions"
        key = self._folder / "new.key"
        _openssl("req", *_NEW_KEY, "-subj", f"/CN={name}", "-out", str(request), "-keyout", str(key))
        extensions.write_text(f"subjectAltName={alternative}\nbasicConstraints=CA:FALSE\n")
        signed = _openssl(
            *("x509", "-req", "-in", str(request), "-CA", str(self.certificate), "-CAkey", str(self._key)),
            *("-days", str(days), "-extfile", str(extensions)),
        )
        # The key before the certificate, so that whoever follows these files also sees a pair that does not fit.
        pair.key.write_bytes(key.read_bytes())
        pair.certificate.write_bytes(signed)
        return pair


def _openssl(*arguments: str) -> bytes:
    try:
        done = subprocess.run(["openssl", *arguments], check=True, capture_output=True, timeout=60)  # noqa: S607
    except FileNotFoundError:
        pytest.skip("openssl is not installed")
    return done.stdout
