"""Files with secrets, one a line, such as `openssl rand -hex 32` prints."""

import binascii
from pathlib import Path

from kvstore_codec.errors import ConfigurationError

SECRET_BYTES = 32
MOST_SECRETS = 16
_MOST_FILE_BYTES = 4096


def read_secrets(path: Path, what: str, role: str) -> list[bytes]:
    """The secrets in a file; empty lines and those that begin with # count for nothing. `what` names the secrets in the
    plural and `role` says what the first one does, for errors. May block. Raises ConfigurationError, which does not
    quote them."""
    try:
        with path.open("rb") as file:
            content = file.read(_MOST_FILE_BYTES + 1)
    except OSError as error:
        raise ConfigurationError(f"cannot read the {what} in {path}: {error.strerror}") from error
    lines = [line.strip() for line in content.splitlines()]
    lines = [line for line in lines if line and not line.startswith(b"#")]
    try:
        secrets = [binascii.unhexlify(line) for line in lines]
    except binascii.Error:
        secrets = []
    if (
        not 1 <= len(secrets) <= MOST_SECRETS
        or len(content) > _MOST_FILE_BYTES
        or any(len(secret) != SECRET_BYTES for secret in secrets)
    ):
        raise ConfigurationError(
            f"{path} has no {what}: it must have 1 to {MOST_SECRETS} lines of {2 * SECRET_BYTES} hexadecimal "
            f"digits, such as `openssl rand -hex 32` prints; {role}"
        )
    return secrets
