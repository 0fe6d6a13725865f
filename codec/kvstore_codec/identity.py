"""Names of chunks: what the tokens are (`ContentId`) and what stood before them (`PrefixId`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NewType, TypeAlias

import numpy as np
import numpy.typing as npt
from blake3 import blake3

from kvstore_codec import canonical
from kvstore_codec.errors import InvalidTokensError

if TYPE_CHECKING:  # storage nodes name chunks too, and start a second sooner without it
    import torch

ContentId = NewType("ContentId", bytes)
PrefixId = NewType("PrefixId", bytes)
TokenIds: TypeAlias = "Sequence[int] | npt.NDArray[np.integer] | torch.Tensor"

CHUNK_TOKENS = 256
# What stands before the first chunk of a text.
ROOT_PREFIX = PrefixId(bytes(canonical.DIGEST_BYTES))

_CONTENT_DOMAIN = b"kvstore.content.v1"
_PREFIX_DOMAIN = b"kvstore.prefix.v1"


@dataclass(frozen=True, slots=True)
class ChunkId:
    """Equal `prefix_id`: exact reuse. Equal `content_id` alone: approximate reuse."""

    content_id: ContentId
    prefix_id: PrefixId

    def __post_init__(self) -> None:
        canonical.require_digest("content_id", self.content_id)
        canonical.require_digest("prefix_id", self.prefix_id)

    @property
    def short(self) -> str:
        """8 + 8 hex digits, for messages."""
        return f"{self.content_id.hex()[:8]}+{self.prefix_id.hex()[:8]}"


def content_id(spec_digest: bytes, tenant_salt: bytes, token_ids: TokenIds) -> ContentId:
    """blake3 over (domain, spec digest, tenant salt, token ids as i32 LE), each length-prefixed.

    `token_ids` is one-dimensional. Raises InvalidTokensError for ids outside 32 bits.
    """
    tokens = _as_int32(token_ids)
    return ContentId(canonical.digest(_CONTENT_DOMAIN, spec_digest, tenant_salt, tokens.tobytes()))


def prefix_id(parent: PrefixId, content: ContentId) -> PrefixId:
    """blake3 over (domain, parent, content): names the whole text up to and including this chunk."""
    return PrefixId(canonical.digest(_PREFIX_DOMAIN, parent, content))


def chunk_ids(
    spec_digest: bytes, tenant_salt: bytes, token_ids: TokenIds, chunk_tokens: int = CHUNK_TOKENS
) -> list[ChunkId]:
    """One id per full chunk of `chunk_tokens`; the rest of the text has no name yet.

    Raises InvalidTokensError for ids outside 32 bits.
    """
    if chunk_tokens < 1:
        raise InvalidTokensError(f"a chunk holds at least one token, not {chunk_tokens}")
    tokens = _as_int32(token_ids)
    full = len(tokens) // chunk_tokens
    data = memoryview(tokens[: full * chunk_tokens].tobytes())
    chunk_bytes = chunk_tokens * tokens.itemsize
    # Everything before the tokens is the same for all chunks: hashed once.
    before_tokens = blake3(
        canonical.length_prefixed(_CONTENT_DOMAIN, spec_digest, tenant_salt)
        + chunk_bytes.to_bytes(8, "little")
    )
    ids: list[ChunkId] = []
    parent = ROOT_PREFIX
    for start in range(0, len(data), chunk_bytes):
        content = ContentId(before_tokens.copy().update(data[start : start + chunk_bytes]).digest())
        parent = prefix_id(parent, content)
        ids.append(ChunkId(content, parent))
    return ids


def _as_int32(token_ids: TokenIds) -> npt.NDArray[np.int32]:
    if not isinstance(token_ids, np.ndarray | Sequence):
        token_ids = token_ids.detach().cpu().numpy()
    tokens = np.asarray(token_ids) if len(token_ids) else np.empty(0, np.int32)
    if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
        raise InvalidTokensError(
            f"token ids must be one row of whole numbers, got {tokens.ndim} dimensions of {tokens.dtype}"
        )
    limits = np.iinfo(np.int32)
    if tokens.size and (tokens.min() < limits.min or tokens.max() > limits.max):
        raise InvalidTokensError(f"token ids from {tokens.min()} to {tokens.max()} do not fit 32 bits")
    return tokens.astype("<i4")
