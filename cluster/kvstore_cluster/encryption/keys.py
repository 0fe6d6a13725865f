"""The keys of encryption at rest.

A key file has 1 to 16 keys, one a line, of 64 hexadecimal digits. The first one encrypts, all of them decrypt. A key
never encrypts anything itself: for every segment and for every version of a small file, another key is derived from it
and a random salt of 32 bytes, so that the limits of AES-GCM hold for each of them alone.
"""

from __future__ import annotations

import logging
import stat
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from blake3 import blake3

from kvstore_codec.errors import ConfigurationError, EncryptionKeyError
from kvstore_codec.secret_file import read_secrets

if TYPE_CHECKING:
    from kvstore_cluster.encryption.aead import Aead

log = logging.getLogger(__name__)

KEY_ID_BYTES = 8
SALT_BYTES = 32
TAG_BYTES = 16
"""What AES-GCM adds to the bytes that it encrypts."""
_ID_CONTEXT = "kvstore 2026 encryption key id v1"


@dataclass(frozen=True, slots=True)
class EncryptionKey:
    """A key. `id` identifies it in files and messages, and says nothing about the secret."""

    secret: bytes = field(repr=False)
    id: bytes = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(
            self, "id", blake3(self.secret, derive_key_context=_ID_CONTEXT).digest()[:KEY_ID_BYTES]
        )

    @property
    def name(self) -> str:
        """The id in hexadecimal digits."""
        return self.id.hex()

    def derived(self, context: str, salt: bytes) -> bytes:
        """32 bytes that depend on the secret, on what they are for, and on a salt."""
        return blake3(salt, key=blake3(self.secret, derive_key_context=context).digest()).digest()

    def aead(self, context: str, salt: bytes) -> Aead:
        """AES-GCM with a derived key."""
        from kvstore_cluster.encryption.aead import Aead

        return Aead(self.derived(context, salt))


class EncryptionKeys:
    """The keys of a file. Immutable."""

    def __init__(self, secrets: Iterable[bytes]) -> None:
        """`secrets` are one or more random byte strings of 32 bytes, which the project never writes anywhere."""
        keys = [EncryptionKey(secret) for secret in secrets]
        self.first = keys[0]
        """Encrypts what is written now."""
        self._keys = {key.id: key for key in keys}

    def find(self, key_id: bytes) -> EncryptionKey | None:
        return self._keys.get(key_id)

    @property
    def names(self) -> list[str]:
        """Ids of all keys in hexadecimal digits."""
        return [key.name for key in self._keys.values()]


KeySource = Callable[[], EncryptionKeys]
"""Returns the keys as they are now, which change when their file does."""


def first_name(keys: KeySource | None) -> str:
    """Id of the key that encrypts what is written now, in hexadecimal digits. Empty without `keys`. May block: the key
    file is read again."""
    return "" if keys is None else keys().first.name


def key_of(keys: EncryptionKeys | None, key_id: bytes, path: Path, unit: Path) -> EncryptionKey:
    """The key that has encrypted `path`. Raises EncryptionKeyError when it is not among the keys. Its message advises
    to move `unit` away when the key is lost: the file, or the folder that makes sense only as a whole."""
    key = None if keys is None else keys.find(key_id)
    if key is not None:
        return key
    given = (
        "no --encryption-key-file is given" if keys is None else f"the key file has {', '.join(keys.names)}"
    )
    raise EncryptionKeyError(
        f"{path} is encrypted with key {key_id.hex()}, but {given}. Nothing was changed. Start again with a key file "
        f"that has this key, on any line; if the key is lost, what it has encrypted is lost, too: move {unit} away "
        "to start without it"
    )


def read_keys(path: Path) -> EncryptionKeys:
    """Reads a key file. May block. Raises ConfigurationError, which does not quote the keys."""
    try:
        import cryptography  # noqa: F401
    except ImportError as error:
        raise ConfigurationError(
            "encryption at rest needs the package cryptography; install kvstore-service[cluster]"
        ) from error
    keys = EncryptionKeys(read_secrets(path, "encryption keys", "the first key encrypts"))
    try:
        mode = path.stat().st_mode
    except OSError as error:  # removed or replaced in the meantime
        raise ConfigurationError(f"cannot read the mode of {path}: {error.strerror}") from error
    if mode & stat.S_IROTH:
        log.warning("every user of this machine can read the encryption keys in %s; chmod 600 it", path)
    return keys
