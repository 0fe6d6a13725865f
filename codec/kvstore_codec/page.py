"""Opaque pages as chunks: how a page of an engine's cache is named, and what is stored for it.

A page is some bytes under a key, of which only the engine that wrote it knows the meaning. It is stored as a chunk of
one frame of kind PAGE (see `payload`), whose geometry says nothing. Its names come from domains of their own and its
header names a page namespace in place of a model, so that no page is ever taken for the KV of tokens, or the reverse.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import xxhash
from blake3 import blake3
from typing_extensions import Buffer

from kvstore_codec import canonical
from kvstore_codec.chunk import ChunkHeader, frame_digest, make_header
from kvstore_codec.coders import coder
from kvstore_codec.encoding import Encoding, Rate
from kvstore_codec.errors import ForeignChunkError, InvalidKVError
from kvstore_codec.geometry import Geometry
from kvstore_codec.identity import ChunkId, ContentId, PrefixId
from kvstore_codec.model_spec import KVDtype
from kvstore_codec.payload import OPENING_BYTES, PayloadKind, PayloadReader, opening, sample_checksum
from kvstore_codec.signing_keys import SigningKeys

MAX_PAGE_BYTES = 128 << 20
# Every header has a geometry. A page has no layers, heads or tokens: one of each makes one frame.
PAGE_GEOMETRY = Geometry(1, 1, 1, KVDtype.BFLOAT16, tokens=1, frame_tokens=1, period_layers=1)
RAW, ZSTD = Encoding(Rate.EXACT, "raw"), Encoding(Rate.EXACT, "zstd")
ENCODINGS = (RAW, ZSTD)
"""Every encoding that a page may be stored in, the one that is read sooner first."""

_NAMESPACE_DOMAIN = b"kvstore.page-namespace.v1"
_CONTENT_DOMAIN = b"kvstore.page.v1"
_CONTEXT_DOMAIN = b"kvstore.page-context.v1"
_SIZE = struct.Struct("<Q")
# zstd adds less than a hundredth to bytes that it cannot make smaller, and its frame's header.
_CODED_EXTRA_SHARE, _CODED_EXTRA_BYTES = 128, 1024


@dataclass(frozen=True)
class PageNamespace:
    """What the bytes of a page depend on besides its key. Pages of different namespaces never meet.

    Raises InvalidKVError for a rank outside the world.
    """

    model: bytes
    """Id or digest of the model, as the engine has it."""
    layout: str
    """What is in a page and in which order: the engine, its version of the layout, dtype, tokens a page, and so on."""
    rank: int = 0
    """Of the worker whose share of the KV this is."""
    world_size: int = 1
    salt: bytes = b""
    """What else separates pages, such as the engine's cache salt. A client adds its tenant's."""

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world_size:
            raise InvalidKVError(f"rank {self.rank} does not exist in a world of {self.world_size}")

    @cached_property
    def digest(self) -> bytes:
        """blake3 over (domain, model, layout, rank, world size, salt): stands in headers in place of a model."""
        return canonical.digest(
            _NAMESPACE_DOMAIN,
            self.model,
            self.layout.encode(),
            canonical.integer(self.rank),
            canonical.integer(self.world_size),
            self.salt,
        )

    def chunk_ids(self, keys: Iterable[bytes], tenant_salt: bytes = b"") -> list[ChunkId]:
        """The names that the pages of these keys, of any length each, are stored under."""
        # What stands before the key is the same for all pages: hashed once.
        before_key = blake3(canonical.length_prefixed(_CONTENT_DOMAIN, self.digest, tenant_salt))
        ids: list[ChunkId] = []
        for key in keys:
            content = ContentId(before_key.copy().update(canonical.length_prefixed(key)).digest())
            ids.append(ChunkId(content, PrefixId(canonical.digest(_CONTEXT_DOMAIN, content))))
        return ids


def write_page(
    namespace: PageNamespace,
    chunk_id: ChunkId,
    encoding: Encoding,
    page: memoryview,
    keys: SigningKeys | None = None,
) -> tuple[ChunkHeader, tuple[memoryview, ...]]:
    """The chunk of a page: its parsed header, and views that together are its bytes. With the encoding "exact-raw" the
    last of them is `page` itself, not a copy. The chunk is signed if `keys` are given.

    `page` is one row of bytes. Raises InvalidKVError for a page of 0 or more than MAX_PAGE_BYTES bytes.
    """
    if not 1 <= page.nbytes <= MAX_PAGE_BYTES:
        raise InvalidKVError(f"a page has 1 to {MAX_PAGE_BYTES} bytes, not {page.nbytes}")
    if encoding == RAW:
        first, body = opening(PayloadKind.PAGE, sample_checksum()), page
    else:
        plane = np.frombuffer(page, np.uint8).reshape(1, -1)
        first = opening(PayloadKind.PAGE, sample_checksum(plane)) + _SIZE.pack(page.nbytes)
        body = memoryview(coder(encoding.coder).encode(plane))
    header, data = make_header(
        namespace.digest,
        chunk_id,
        encoding,
        PAGE_GEOMETRY,
        [len(first) + body.nbytes],
        [_frame_checksum(first, body)],
        signed_by=None if keys is None else (keys, frame_digest(first, body)),
    )
    return header, (memoryview(data + first), body)


def require_page(header: ChunkHeader, namespace: PageNamespace, chunk_id: ChunkId) -> None:
    """Raises ForeignChunkError unless the chunk is this page."""
    header.require(model_digest=namespace.digest, chunk_id=chunk_id)
    if header.geometry != PAGE_GEOMETRY or header.encoding not in ENCODINGS:
        raise ForeignChunkError(
            f"chunk {chunk_id.short} is not a page, but {header.encoding.name} of {header.geometry}"
        )


def may_fill(header: ChunkHeader, size_bytes: int) -> bool:
    """Whether the page can have `size_bytes`. Only of a page that is not compressed it is certain."""
    body_bytes = header.frame_lengths[0] - OPENING_BYTES
    if header.encoding == RAW:
        return body_bytes == size_bytes
    return 0 < body_bytes <= size_bytes + size_bytes // _CODED_EXTRA_SHARE + _CODED_EXTRA_BYTES


def verify_raw_page(header: ChunkHeader, first: Buffer, page: memoryview) -> None:
    """Check the frame of a page that is not compressed, which came as its opening, `first`, and `page`.

    Raises ChunkFormatError children unless these are the bytes that were stored.
    """
    header.compare_checksum(0, _frame_checksum(first, page))
    header.compare_digest(0, first, page)
    _reader(header, first).finish()


def decode_page(header: ChunkHeader, frame: memoryview, page: memoryview) -> None:
    """Fill `page`, one row of writable bytes, with what was compressed to `frame`.

    Raises InvalidKVError when the page has another size, ChunkFormatError children when it is damaged; what `page`
    holds is then undefined.
    """
    header.verify_frame(0, frame)
    reader = _reader(header, frame)
    (size_bytes,) = reader.unpack(_SIZE)
    if size_bytes != page.nbytes:
        raise InvalidKVError(f"page {header.chunk_id.short} has {size_bytes} bytes, not {page.nbytes}")
    plane = np.frombuffer(page, np.uint8).reshape(1, -1)
    coder(header.encoding.coder).decode(reader.take_rest(), plane)
    reader.decoded(plane)
    reader.finish()


def _reader(header: ChunkHeader, frame: Buffer) -> PayloadReader:
    reader = PayloadReader(frame)
    if reader.kind is not PayloadKind.PAGE:
        raise ForeignChunkError(
            f"chunk {header.chunk_id.short} is named like a page, but holds a frame of kind {reader.kind.name}"
        )
    return reader


def _frame_checksum(first: Buffer, body: memoryview) -> int:
    hasher = xxhash.xxh3_64(first)
    hasher.update(body)
    return int(hasher.intdigest())
