"""The keys of a tenant that sign chunks, and what a signature consists of.

    id of the key, 8 bytes | keyed blake3 of the signed bytes, 32 bytes

It is a message authentication code: who can verify one can make one. Keys are derived from secrets, so that no other
use of a secret gives a signature.
"""

import hmac
from collections.abc import Iterable

from blake3 import blake3
from typing_extensions import Buffer

from kvstore_codec.errors import SignatureError

SIGNATURE_BYTES = 40
_ID_BYTES = 8
_KEY_CONTEXT, _ID_CONTEXT = "kvstore 2026 chunk signature v1", "kvstore 2026 chunk signature key id v1"


class SigningKeys:
    """The keys of a tenant. The first one signs, all of them verify. Immutable."""

    def __init__(self, secrets: Iterable[bytes]) -> None:
        """`secrets` are one or more random byte strings of 32 bytes, which the project never writes anywhere."""
        self._keys = {
            _derived(_ID_CONTEXT, secret)[:_ID_BYTES]: _derived(_KEY_CONTEXT, secret) for secret in secrets
        }
        self._first = next(iter(self._keys))

    def sign(self, covered: Buffer) -> bytes:
        """The signature of these bytes, SIGNATURE_BYTES long."""
        return self._first + blake3(covered, key=self._keys[self._first]).digest()

    def verify(self, covered: Buffer, signature: bytes) -> None:
        """Raises SignatureError unless one of the keys has signed these bytes."""
        key = self._keys.get(signature[:_ID_BYTES])
        if key is None:
            raise SignatureError(
                f"its signature is by key {signature[:_ID_BYTES].hex()}, which is none of this reader's keys "
                f"({', '.join(known.hex() for known in self._keys)})"
            )
        if not hmac.compare_digest(blake3(covered, key=key).digest(), signature[_ID_BYTES:]):
            raise SignatureError("its signature is wrong: it was forged, or the header was changed")


def _derived(context: str, secret: bytes) -> bytes:
    return blake3(secret, derive_key_context=context).digest()
