"""How the servers of a cluster identify callers, and how they call one another."""

from dataclasses import dataclass, field
from pathlib import Path

from pydantic import SecretStr

from kvstore_client.connector import Connector, read_token
from kvstore_client.settings import SecuritySettings
from kvstore_codec.errors import ConfigurationError
from kvstore_service.identity import Access, CredentialFile, new_token
from kvstore_service.identity.credential import token_id
from kvstore_service.listen import Address
from kvstore_service.settings import Settings
from kvstore_service.tls import ServerTls, TlsFiles


@dataclass(frozen=True, slots=True)
class Security:
    """Given to every process of a cluster. Without `credentials`, the file of `kvstore credentials`, callers are not
    identified. Without `tls` all ports are plain TCP. `ca` is the PEM file of the authority that signed the
    certificates of the cluster's servers; without it they all have the certificate in `tls`. `name` is the name that
    these certificates have; empty: the host of each server. `node_token` is the token of the cluster's own
    processes."""

    credentials: Path | None = None
    node_token: str = field(default="", repr=False)
    tls: TlsFiles | None = None
    ca: Path | None = None
    name: str = ""

    @classmethod
    def of_cluster(cls, settings: Settings) -> "Security":
        """The security of a cluster that starts now. Without a `node_token_file` its processes get a new token. Raises
        ConfigurationError for an unusable file."""
        credentials, certificate, key = settings.credentials, settings.tls_cert, settings.tls_key
        tls = None
        if certificate is not None and key is not None:
            client_ca = settings.tls_client_ca
            tls = TlsFiles(certificate.absolute(), key.absolute(), client_ca and client_ca.absolute())
        return cls(
            credentials and credentials.absolute(),
            "" if credentials is None else _node_token(settings.node_token_file),
            tls,
            settings.tls_ca and settings.tls_ca.absolute(),
            settings.tls_name or "",
        )

    def require_for(self, listen: Address, settings: Settings) -> None:
        """Raises ConfigurationError for files that cannot be used, and for a cluster that others than this machine can
        reach although it lacks credentials or TLS, unless the settings allow that."""
        self.access()
        self.server_tls()
        self.connector()
        missing = [
            option
            for option, given in (
                ("--credentials FILE (`kvstore credentials add` makes it)", self.credentials),
                ("--tls-cert FILE and --tls-key FILE", self.tls),
            )
            if given is None
        ]
        opened = [listen] if settings.events is None else [listen, Address.parse(settings.events)]
        outside = [str(address) for address in opened if not address.is_loopback]
        exposed = settings.ray_address is not None or outside
        if exposed and missing and not settings.insecure:
            where = "the nodes of a Ray cluster" if settings.ray_address is not None else outside[0]
            raise ConfigurationError(
                f"other machines can reach {where}, and whoever does can read and delete all chunks: give "
                f"{' and '.join(missing)}, or --insecure if the network keeps everybody else out (docs/security.md)"
            )

    @property
    def isolated(self) -> bool:
        """Whether nodes keep tenants apart."""
        return self.credentials is not None

    def access(self) -> Access:
        """Identifies the callers of a process. Raises ConfigurationError for an unusable file."""
        file = None if self.credentials is None else CredentialFile(self.credentials)
        return Access(
            file, self.node_token, certificates=self.tls is not None and self.tls.client_ca is not None
        )

    def server_tls(self) -> ServerTls | None:
        """TLS of the ports of a process. Raises ConfigurationError for unusable files."""
        return None if self.tls is None else ServerTls(self.tls)

    def connector(self) -> Connector:
        """Opens connections to other processes of the cluster. Raises ConfigurationError for unusable files."""
        return Connector(
            SecuritySettings(
                token=SecretStr(self.node_token),
                tls_ca=self.ca if self.tls is not None else None,
                tls_cert=self.tls.certificate if self.tls is not None else None,
                tls_key=self.tls.key if self.tls is not None else None,
                tls_name=self.name,
            )
        )


def _node_token(file: Path | None) -> str:
    if file is None:
        return new_token()[1]
    token = read_token(file)
    if not token_id(token):
        raise ConfigurationError(
            f"{file} has no token: write what `kvstore credentials add nodes --tenant '*' --scope node` prints"
        )
    return token


INSECURE = Security()
"""Callers are not identified, and ports are plain TCP."""
