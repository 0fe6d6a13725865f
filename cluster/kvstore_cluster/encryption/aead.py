"""AES-256-GCM of the `cryptography` package. Import it only where data is encrypted."""

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from kvstore_codec.errors import ChecksumError

Data = bytes | bytearray | memoryview


class Aead:
    """AES-256-GCM with one key of 32 bytes. Thread-safe. No two calls of `encrypt` and `encrypt_into` may have the same
    number, which is the nonce. AES-GCM allows 2^32 calls and 64 GiB in each of them."""

    def __init__(self, key: bytes) -> None:
        self._cipher = AESGCM(key)

    def encrypt(self, number: int, data: Data, bound: bytes) -> bytes:
        """Encrypts `data` and returns it with its tag. `decrypt` succeeds for the same `number` and `bound` only."""
        return self._cipher.encrypt(_nonce(number), data, bound)

    def decrypt(self, number: int, data: Data, bound: bytes) -> bytes:
        """Decrypts what `encrypt` returned. Raises ChecksumError unless it is exactly that."""
        try:
            return self._cipher.decrypt(_nonce(number), data, bound)
        except InvalidTag as error:
            raise ChecksumError(_REFUSED) from error

    def encrypt_into(self, number: int, data: Data, bound: bytes, target: memoryview) -> None:
        """As `encrypt`. `target` is `keys.TAG_BYTES` longer than `data`."""
        self._cipher.encrypt_into(_nonce(number), data, bound, target)

    def decrypt_into(self, number: int, data: Data, bound: bytes, target: memoryview) -> None:
        """As `decrypt`. `target` is `keys.TAG_BYTES` shorter than `data`; its content is undefined after an
        exception."""
        try:
            self._cipher.decrypt_into(_nonce(number), data, bound, target)
        except InvalidTag as error:
            raise ChecksumError(_REFUSED) from error


_REFUSED = "encrypted bytes fail authentication: they were changed, cut, or written for another place"


def _nonce(number: int) -> bytes:
    return number.to_bytes(12, "little")
