"""Small files that are encrypted as a whole.

    magic "KVSCRYPT" | version u32 | id of the key, 8 bytes | salt, 32 bytes | encrypted bytes | tag, 16 bytes

Every version of a file has a random salt, and thereby a key of its own. The tag covers what precedes it and the name of
the file, so that no file passes for another one.
"""

import os
import struct
from pathlib import Path

from kvstore_cluster.encryption.keys import KEY_ID_BYTES, SALT_BYTES, TAG_BYTES, KeySource, first_name, key_of
from kvstore_codec.errors import ChecksumError, UnsupportedVersionError

_OPENING = struct.Struct(f"<8sI{KEY_ID_BYTES}s{SALT_BYTES}s")
_MAGIC, _VERSION = b"KVSCRYPT", 1
_CONTEXT = "kvstore 2026 encrypted file v1"
_KEY_START = 12
ADDED_BYTES = _OPENING.size + TAG_BYTES
"""An encrypted file is at most so much longer than its content."""


class FileCipher:
    """Encrypts the contents of small files with the first key that `keys` returns, and decrypts them with any. Without
    `keys` contents stay as they are. Plain files are read in either case: a node that begins to encrypt has some."""

    def __init__(self, keys: KeySource | None = None) -> None:
        self._keys = keys

    def encrypt(self, path: Path, content: bytes) -> bytes:
        """The bytes to write to `path`."""
        if self._keys is None:
            return content
        key, salt = self._keys().first, os.urandom(SALT_BYTES)
        opening = _OPENING.pack(_MAGIC, _VERSION, key.id, salt)
        return opening + key.aead(_CONTEXT, salt).encrypt(0, content, opening + path.name.encode())

    def decrypt(self, path: Path, data: bytes) -> bytes:
        """The content of `path`, from which `data` was read. Raises EncryptionKeyError for a file of an unknown key,
        UnsupportedVersionError, and ChecksumError for a file that was changed."""
        if not data.startswith(_MAGIC):
            return data
        if len(data) < ADDED_BYTES:
            raise ChecksumError(f"{path} ends too early")
        _, version, key_id, salt = _OPENING.unpack_from(data)
        if version != _VERSION:
            raise UnsupportedVersionError(
                f"{path} is encrypted in format version {version}, but this release reads version {_VERSION}"
            )
        key = key_of(None if self._keys is None else self._keys(), key_id, path, path)
        bound = data[: _OPENING.size] + path.name.encode()
        return key.aead(_CONTEXT, salt).decrypt(0, memoryview(data)[_OPENING.size :], bound)

    @property
    def key_name(self) -> str:
        """Id of the key with which `encrypt` encrypts now, in hexadecimal digits. Empty when it does not."""
        return first_name(self._keys)


def key_name_of(data: bytes) -> str:
    """Id of the key that has encrypted `data`, the beginning of a file. Empty for a plain one."""
    return data[_KEY_START : _KEY_START + KEY_ID_BYTES].hex() if data.startswith(_MAGIC) else ""
