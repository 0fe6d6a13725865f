"""Signatures of chunks, by which a reader knows that the writer had a key of its tenant.

    id of the key, 8 bytes | keyed blake3 of the header up to the signature, 32 bytes

The signature is the last field of a chunk's header, so it covers all others: the names of model, text and context, the
encoding, and a digest of every frame. It is a message authentication code: who can verify one can make one. Keys are
derived from secrets, so that no other use of a secret gives a signature.
"""

from __future__ import annotations

import hmac
from collections.abc import Iterable
from dataclasses import replace

from blake3 import blake3
from typing_extensions import Buffer

from kvstore_codec.chunk import SIGNATURE_BYTES, ChunkHeader
from kvstore_codec.errors import SignatureError, UnsignedChunkError

SECRET_BYTES = 32
_ID_BYTES = 8
_KEY_CONTEXT, _ID_CONTEXT = "kvstore 2026 chunk signature v1", "kvstore 2026 chunk signature key id v1"


class SigningKeys:
    """The keys of a tenant. The first one signs, all of them verify. Immutable."""

    def __init__(self, secrets: Iterable[bytes]) -> None:
        """`secrets` are one or more random byte strings of SECRET_BYTES, which the project never writes anywhere."""
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


def verified(header: ChunkHeader, data: Buffer, keys: SigningKeys) -> ChunkHeader:
    """The header, which was read from `data`, as one whose frames must have the digests that were signed. Raises
    UnsignedChunkError and SignatureError."""
    if not header.signature:
        raise UnsignedChunkError(f"chunk {header.chunk_id.short} is not signed")
    end = header.header_bytes - _CHECKSUM_BYTES
    view = memoryview(data)[:end]
    if view[-SIGNATURE_BYTES:] != header.signature:
        raise SignatureError(f"chunk {header.chunk_id.short}: its signature is not at the end of its header")
    try:
        keys.verify(view[:-SIGNATURE_BYTES], header.signature)
    except SignatureError as error:
        raise SignatureError(f"chunk {header.chunk_id.short}: {error}") from None
    return replace(header, is_verified=True)


def _derived(context: str, secret: bytes) -> bytes:
    return blake3(secret, derive_key_context=context).digest()


_CHECKSUM_BYTES = 8
"""Of the header's own checksum, which follows the signature."""
