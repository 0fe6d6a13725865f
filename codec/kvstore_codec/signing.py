"""Signatures of chunks, by which a reader knows that the writer had a key of its tenant.

The signature is the last field of a chunk's header, so it covers all others: the names of model, text and context, the
encoding, and a digest of every frame.
"""

from dataclasses import replace

from typing_extensions import Buffer

from kvstore_codec.chunk import ChunkHeader
from kvstore_codec.errors import SignatureError, UnsignedChunkError
from kvstore_codec.signing_keys import SIGNATURE_BYTES, SigningKeys

_CHECKSUM_BYTES = 8
"""Of the header's own checksum, which follows the signature."""


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
