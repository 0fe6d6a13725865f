"""Verifies whole chunks, whose bytes may lie in several places."""

from collections.abc import Iterable, Iterator, Sequence
from typing import cast

import xxhash
from typing_extensions import Buffer

from kvstore_codec.chunk import FIXED_PREFIX_BYTES, ChunkHeader, bytes_view, header_length, read_header
from kvstore_codec.errors import TruncatedChunkError


def verify_chunk(parts: Iterable[Buffer] | Buffer, size_bytes: int) -> ChunkHeader:
    """Verifies a whole chunk of `size_bytes` that may be split into `parts`: the header, the total size and the
    checksum of every frame. Copies only a header that spans several parts.

    Raises ChunkFormatError or a subclass.
    """
    views = _views(parts)
    available = sum(view.nbytes for view in views)
    if available < size_bytes:
        raise TruncatedChunkError(
            f"the chunk should have {size_bytes} bytes, but only {available} are available"
        )
    first = _gather(views, min(FIXED_PREFIX_BYTES, size_bytes))
    header = read_header(_gather(views, min(header_length(first), size_bytes)))
    if header.size_bytes != size_bytes:
        raise TruncatedChunkError(
            f"the header of chunk {header.chunk_id.short} gives a size of {header.size_bytes} bytes, "
            f"but the chunk has {size_bytes}"
        )
    pieces = _pieces(views, header.header_bytes)
    rest = memoryview(b"")
    for frame, length in enumerate(header.frame_lengths):
        hasher = xxhash.xxh3_64()
        while length:
            if not rest.nbytes:
                rest = next(pieces)
            hasher.update(rest[:length])
            length, rest = length - len(rest[:length]), rest[length:]
        header.compare_checksum(frame, hasher.intdigest())
    return header


def _views(parts: Iterable[Buffer] | Buffer) -> list[memoryview]:
    try:
        return [bytes_view(cast("Buffer", parts))]
    except TypeError:  # not one buffer, hence several
        return [bytes_view(part) for part in cast("Iterable[Buffer]", parts)]


def _gather(views: Sequence[memoryview], length: int) -> memoryview:
    """The first `length` bytes. A view if they are in one part, otherwise a copy."""
    if views and views[0].nbytes >= length:
        return views[0][:length]
    taken = bytearray()
    for view in views:
        taken += view[: length - len(taken)]
        if len(taken) == length:
            break
    return memoryview(taken)


def _pieces(views: Sequence[memoryview], skip: int) -> Iterator[memoryview]:
    """The bytes after the first `skip`, part by part."""
    for view in views:
        if view.nbytes > skip:
            yield view[skip:]
        skip = max(skip - view.nbytes, 0)
