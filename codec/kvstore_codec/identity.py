"""Names of chunks. A `ContentId` names the tokens; a `PrefixId` also names all tokens before them."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NewType, TypeAlias

import numpy as np
import numpy.typing as npt
from blake3 import blake3

from kvstore_codec import canonical
from kvstore_codec.errors import InvalidTokensError

if TYPE_CHECKING:  # storage nodes import this module too, and start a second faster without torch
    import torch

ContentId = NewType("ContentId", bytes)
PrefixId = NewType("PrefixId", bytes)
TokenIds: TypeAlias = "Sequence[int] | npt.NDArray[np.integer] | torch.Tensor"

CHUNK_TOKENS = 256
# Parent of the first chunk of a text.
ROOT_PREFIX = PrefixId(bytes(canonical.DIGEST_BYTES))

_CONTENT_DOMAIN = b"kvstore.content.v1"
_PREFIX_DOMAIN = b"kvstore.prefix.v1"
_BEHIND_APPROXIMATE_DOMAIN = b"kvstore.behind-approximate.v1"
_GENERATION_DOMAIN = b"kvstore.generation.v1"
_QUALIFIED_DOMAIN = b"kvstore.qualified.v1"


@dataclass(frozen=True, slots=True)
class ChunkId:
    """Name of a chunk. Chunks with equal `prefix_id` allow exact reuse; with only equal `content_id`, approximate."""

    content_id: ContentId
    prefix_id: PrefixId

    def __post_init__(self) -> None:
        canonical.require_digest("content_id", self.content_id)
        canonical.require_digest("prefix_id", self.prefix_id)

    @property
    def short(self) -> str:
        """Short form for messages: 8 + 8 hex digits."""
        return f"{self.content_id.hex()[:8]}+{self.prefix_id.hex()[:8]}"


@dataclass(frozen=True, slots=True)
class PlacedChunk:
    """A chunk at its place in a prompt. `parent` is the `prefix_id` of the text before it."""

    chunk_id: ChunkId
    parent: PrefixId
    first_token: int
    """Position of its first token in the prompt."""


def content_id(spec_digest: bytes, tenant_salt: bytes, token_ids: TokenIds) -> ContentId:
    """blake3 over (domain, spec digest, tenant salt, token ids as i32 LE), each length-prefixed.

    `token_ids` is one-dimensional. Raises InvalidTokensError for ids outside 32 bits.
    """
    tokens = _as_int32(token_ids)
    return ContentId(canonical.digest(_CONTENT_DOMAIN, spec_digest, tenant_salt, tokens.tobytes()))


def qualified_salt(tenant_salt: bytes, qualifier: bytes) -> bytes:
    """Salt that replaces the tenant's in the `content_id` of a chunk whose KV depends on something besides the model
    and the tokens (an adapter, an image, an engine's own salt). An empty `qualifier` changes nothing."""
    return canonical.digest(_QUALIFIED_DOMAIN, tenant_salt, qualifier) if qualifier else tenant_salt


def prefix_id(parent: PrefixId, content: ContentId) -> PrefixId:
    """blake3 over (domain, parent, content): names the whole text up to and including this chunk."""
    return PrefixId(canonical.digest(_PREFIX_DOMAIN, parent, content))


def behind_approximate(parent: PrefixId) -> PrefixId:
    """Replacement for `parent` after approximately reused KV. KV that is computed after such KV differs from the KV of
    the exact text, so its name uses a context that no exact text has."""
    return PrefixId(canonical.digest(_BEHIND_APPROXIMATE_DOMAIN, parent))


def naming_digest(spec_digest: bytes, generation: int) -> bytes:
    """Digest that replaces the ModelSpec's digest in chunk names after its canary was replaced `generation` times.
    Chunks of earlier generations are never named again."""
    if generation == 0:
        return spec_digest
    return canonical.digest(_GENERATION_DOMAIN, spec_digest, canonical.integer(generation))


def begins_text(chunk_id: ChunkId) -> bool:
    """Whether the chunk is the first of its text."""
    return chunk_id.prefix_id == prefix_id(ROOT_PREFIX, chunk_id.content_id)


def chunk_ids(
    spec_digest: bytes, tenant_salt: bytes, token_ids: TokenIds, chunk_tokens: int = CHUNK_TOKENS
) -> list[ChunkId]:
    """Ids of the full chunks of `chunk_tokens` tokens. The shorter rest of the text has no id.

    Raises InvalidTokensError for ids outside 32 bits.
    """
    whole = segment_chunks(spec_digest, tenant_salt, token_ids, [len(token_ids)], chunk_tokens)
    return [placed.chunk_id for placed in whole]


def segment_chunks(
    spec_digest: bytes,
    tenant_salt: bytes,
    token_ids: TokenIds,
    segments: Sequence[int],
    chunk_tokens: int = CHUNK_TOKENS,
) -> list[PlacedChunk]:
    """The full chunks of a prompt of adjacent segments, in order of position. `segments` gives the length of each.

    Each segment is cut from its own start, so that a document has the same `content_id`s at any position. The shorter
    rest of a segment is not a chunk, but is part of the context of all later chunks. With one segment the result has
    the names of `chunk_ids`.

    Raises InvalidTokensError for ids outside 32 bits, and for lengths that are negative or do not sum to the number of
    tokens.
    """
    if chunk_tokens < 1:
        raise InvalidTokensError(f"chunk_tokens must be at least 1, got {chunk_tokens}")
    tokens = _as_int32(token_ids)
    lengths = [operator.index(length) for length in segments]
    if min(lengths, default=0) < 0 or sum(lengths) != len(tokens):
        raise InvalidTokensError(
            f"{len(lengths)} segments of {sum(lengths)} tokens together do not make a prompt of {len(tokens)} tokens; "
            "their lengths must be 0 or more and sum to the length of the prompt"
        )
    data = memoryview(tokens.tobytes())
    chunk_bytes = chunk_tokens * tokens.itemsize
    # All chunks share the fields before the tokens, so they are hashed once.
    before_tokens = blake3(
        canonical.length_prefixed(_CONTENT_DOMAIN, spec_digest, tenant_salt)
        + chunk_bytes.to_bytes(8, "little")
    )
    placed: list[PlacedChunk] = []
    parent, first = ROOT_PREFIX, 0
    for length in lengths:
        end = first + length
        while first < end:
            after = min(first + chunk_tokens, end)
            if after - first == chunk_tokens:
                piece = data[first * tokens.itemsize : after * tokens.itemsize]
                content = ContentId(before_tokens.copy().update(piece).digest())
            else:
                content = content_id(spec_digest, tenant_salt, tokens[first:after])
            context = prefix_id(parent, content)
            if after - first == chunk_tokens:
                placed.append(PlacedChunk(ChunkId(content, context), parent, first))
            parent, first = context, after
    return placed


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
