"""The chunk format.

    magic "KVC\\0" | version u16 | header length u32 | header (msgpack) | xxh3_64 of all that, u64 | frames

All numbers are little-endian. The header names model, text, context, encoding and geometry, and holds the
length (u32) and the xxh3_64 (u64) of every frame. Frames follow back to back in the order of `Geometry`;
their offsets are sums of lengths, never stored, so that they cannot contradict them.

A reader allocates nothing on the word of a length: each one is checked against a cap or against the bytes
that are really there.

Version 2 put a checksum of the decoded samples into every frame (see `payload`). Version 1 had none and is refused: a
decoder may make anything of a frame of that version, and nothing would notice.
"""

from __future__ import annotations

import itertools
import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, cast

import msgpack  # type: ignore[import-untyped]
import numpy as np
import xxhash
from typing_extensions import Buffer

from kvstore_codec.canonical import require_digest
from kvstore_codec.encoding import Encoding
from kvstore_codec.errors import (
    ChecksumError,
    ChunkFormatError,
    CodecError,
    ForeignChunkError,
    TruncatedChunkError,
    UnsupportedVersionError,
)
from kvstore_codec.geometry import Geometry
from kvstore_codec.identity import ChunkId, ContentId, PrefixId
from kvstore_codec.model_spec import KVDtype
from kvstore_codec.token_order import TokenOrder

MAGIC = b"KVC\0"
VERSION = 2
MAX_HEADER_BYTES = 1 << 20

_FIXED_PREFIX = struct.Struct("<4sHI")
FIXED_PREFIX_BYTES = _FIXED_PREFIX.size
_CHECKSUM = struct.Struct("<Q")
_LENGTH_DTYPE, _CHECKSUM_DTYPE = np.dtype("<u4"), np.dtype("<u8")
_GEOMETRY_FIELDS = 7
MAX_FRAME_BYTES = int(np.iinfo(_LENGTH_DTYPE).max)


@dataclass(frozen=True, slots=True)
class ChunkHeader:
    """What a chunk is and where its frames are. `header_bytes` is the offset of the first frame."""

    model_digest: bytes
    chunk_id: ChunkId
    encoding: Encoding
    geometry: Geometry
    frame_lengths: tuple[int, ...]
    frame_checksums: tuple[int, ...]
    header_bytes: int
    calibration: bytes | None = None
    """Digest of the calibration that its frames were coded with, if any was needed."""
    token_order: TokenOrder | None = None
    """Which of its tokens matter most, where whoever stored it said so."""
    _offsets: tuple[int, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        offsets = itertools.accumulate(self.frame_lengths, initial=self.header_bytes)
        object.__setattr__(self, "_offsets", tuple(offsets))

    @property
    def size_bytes(self) -> int:
        """Of the whole chunk, header included."""
        return self._offsets[-1]

    def frame_offset(self, frame: int) -> int:
        """Offset of the frame's first byte in the chunk; `frame_count` gives the chunk's end."""
        return self._offsets[frame]

    def range_bytes(self, first: int, count: int) -> tuple[int, int]:
        """(offset, length) of `count` neighbouring frames. Raises ChunkFormatError outside the chunk."""
        if first < 0 or count < 0 or first + count > len(self.frame_lengths):
            raise ChunkFormatError(
                f"chunk {self.chunk_id.short} has {len(self.frame_lengths)} frames; "
                f"asked for {count} from frame {first}"
            )
        return self._offsets[first], self._offsets[first + count] - self._offsets[first]

    def verify_frame(self, frame: int, data: Buffer) -> None:
        """Raises TruncatedChunkError for a wrong length, ChecksumError for wrong bytes."""
        length = memoryview(data).nbytes
        if length != self.frame_lengths[frame]:
            raise TruncatedChunkError(
                f"chunk {self.chunk_id.short}: frame {frame} has {self.frame_lengths[frame]} bytes, "
                f"got {length}"
            )
        self._compare_checksum(frame, xxhash.xxh3_64_intdigest(data))

    def require(self, *, model_digest: bytes, chunk_id: ChunkId) -> None:
        """Raises ForeignChunkError, naming what differs, unless the chunk is the one that was asked for."""
        for what, found, wanted in (
            ("model", self.model_digest, model_digest),
            ("content", self.chunk_id.content_id, chunk_id.content_id),
            ("context", self.chunk_id.prefix_id, chunk_id.prefix_id),
        ):
            if found != wanted:
                raise ForeignChunkError(
                    f"chunk {self.chunk_id.short} belongs to another {what}: "
                    f"{found.hex()[:16]} instead of {wanted.hex()[:16]}"
                )

    def _compare_checksum(self, frame: int, found: int) -> None:
        if found != self.frame_checksums[frame]:
            raise ChecksumError(
                f"chunk {self.chunk_id.short}: frame {frame} was damaged "
                f"(xxh3 {found:016x} instead of {self.frame_checksums[frame]:016x})"
            )


def write_header(
    model_digest: bytes,
    chunk_id: ChunkId,
    encoding: Encoding,
    geometry: Geometry,
    frames: Sequence[Buffer],
    calibration: bytes | None = None,
    token_order: TokenOrder | None = None,
) -> tuple[ChunkHeader, bytes]:
    """The header of a chunk with these encoded `frames`, parsed and as bytes.

    Raises ChunkFormatError for frames or a `token_order` that are not of a chunk of this geometry."""
    lengths = [memoryview(frame).nbytes for frame in frames]
    if len(lengths) != geometry.frame_count or max(lengths) > MAX_FRAME_BYTES:
        raise ChunkFormatError(
            f"chunk {chunk_id.short}: {len(lengths)} frames of up to {max(lengths, default=0)} bytes do not "
            f"make a chunk of {geometry.frame_count} frames of at most {MAX_FRAME_BYTES} bytes"
        )
    checksums = [xxhash.xxh3_64_intdigest(frame) for frame in frames]
    fields: dict[str, Any] = {
        "model": model_digest,
        "content": chunk_id.content_id,
        "prefix": chunk_id.prefix_id,
        "encoding": encoding.name,
        "geometry": [
            geometry.layers,
            geometry.kv_heads,
            geometry.head_dim,
            geometry.dtype.value,
            geometry.tokens,
            geometry.frame_tokens,
            geometry.period_layers,
        ],
        "lengths": np.array(lengths, _LENGTH_DTYPE).tobytes(),
        "checksums": np.array(checksums, _CHECKSUM_DTYPE).tobytes(),
    }
    if calibration is not None:
        fields["calibration"] = calibration
    if token_order is not None:
        fields["token_order"] = token_order.pack(geometry.tokens)
    body: bytes = msgpack.packb(fields)
    signed = _FIXED_PREFIX.pack(MAGIC, VERSION, len(body)) + body
    data = signed + _CHECKSUM.pack(xxhash.xxh3_64_intdigest(signed))
    header = ChunkHeader(
        model_digest,
        chunk_id,
        encoding,
        geometry,
        tuple(lengths),
        tuple(checksums),
        len(data),
        calibration,
        token_order,
    )
    return header, data


def header_length(first_bytes: Buffer) -> int:
    """Bytes of the whole header, checksum included, told by the chunk's first FIXED_PREFIX_BYTES.

    Raises a ChunkFormatError for bytes that do not begin a chunk of this version.
    """
    view = _bytes_view(first_bytes)
    if view.nbytes < FIXED_PREFIX_BYTES:
        raise TruncatedChunkError(f"{view.nbytes} bytes are not even the beginning of a chunk")
    magic, version, length = _FIXED_PREFIX.unpack_from(view)
    if magic != MAGIC:
        raise ChunkFormatError(
            f"these bytes are not a chunk: they begin with {magic.hex()}, not {MAGIC.hex()}"
        )
    if version != VERSION:
        raise UnsupportedVersionError(
            f"the chunk has format version {version}, this codec reads version {VERSION} only; "
            "update whichever side is older, and chunks of older versions are computed again"
        )
    total = int(FIXED_PREFIX_BYTES + length + _CHECKSUM.size)
    if total > MAX_HEADER_BYTES:
        raise ChunkFormatError(f"a chunk header of {total} bytes is absurd: at most {MAX_HEADER_BYTES}")
    return total


def read_header(data: Buffer) -> ChunkHeader:
    """`data` is a whole chunk or its beginning, at least the header. Raises ChunkFormatError children."""
    view = _bytes_view(data)
    total = header_length(view)
    if view.nbytes < total:
        raise TruncatedChunkError(f"the chunk's header has {total} bytes, only {view.nbytes} are there")
    signed = view[: total - _CHECKSUM.size]
    (stored,) = _CHECKSUM.unpack_from(view, len(signed))
    if xxhash.xxh3_64_intdigest(signed) != stored:
        raise ChecksumError("the chunk's header was damaged: its checksum does not match")
    try:
        fields = msgpack.unpackb(signed[FIXED_PREFIX_BYTES:])
        return _parse(fields, total)
    except ChunkFormatError:
        raise
    # Bytes with a right checksum may still be anything: whatever does not parse is one thing, a bad header.
    except (CodecError, ValueError, KeyError, TypeError, msgpack.UnpackException) as error:
        raise ChunkFormatError(f"the chunk's header cannot be read: {repr(error)[:200]}") from error


def verify_chunk(parts: Iterable[Buffer] | Buffer, size_bytes: int) -> ChunkHeader:
    """Checks a whole chunk of `size_bytes` that may lie scattered over `parts`: header, total size and the
    checksum of every frame. Copies nothing but a header that spans several parts.

    Raises ChunkFormatError children.
    """
    views = _views(parts)
    available = sum(view.nbytes for view in views)
    if available < size_bytes:
        raise TruncatedChunkError(f"the chunk should have {size_bytes} bytes, {available} are there")
    first = _gather(views, min(FIXED_PREFIX_BYTES, size_bytes))
    header = read_header(_gather(views, min(header_length(first), size_bytes)))
    if header.size_bytes != size_bytes:
        raise TruncatedChunkError(
            f"chunk {header.chunk_id.short} says it has {header.size_bytes} bytes, "
            f"it was given as {size_bytes}"
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
        header._compare_checksum(frame, hasher.intdigest())
    return header


def _parse(fields: Any, header_bytes: int) -> ChunkHeader:
    dimensions = fields["geometry"]
    if len(dimensions) != _GEOMETRY_FIELDS:
        raise ChunkFormatError(f"a chunk's geometry has {_GEOMETRY_FIELDS} fields, not {len(dimensions)}")
    geometry = _geometry(*dimensions)
    lengths = np.frombuffer(fields["lengths"], _LENGTH_DTYPE)
    checksums = np.frombuffer(fields["checksums"], _CHECKSUM_DTYPE)
    if not len(lengths) == len(checksums) == geometry.frame_count:
        raise ChunkFormatError(
            f"a chunk of {geometry.frame_count} frames indexes {len(lengths)} lengths and "
            f"{len(checksums)} checksums"
        )
    require_digest("the model digest", fields["model"])
    encoding, calibration = Encoding.parse(fields["encoding"]), fields.get("calibration")
    if encoding.needs_calibration != (calibration is not None):
        raise ChunkFormatError(
            f"a chunk coded as {encoding.name} names a calibration, or lacks one, against its kind"
        )
    if calibration is not None:
        require_digest("the calibration's digest", calibration)
    packed = fields.get("token_order")
    return ChunkHeader(
        fields["model"],
        ChunkId(ContentId(fields["content"]), PrefixId(fields["prefix"])),
        encoding,
        geometry,
        tuple(lengths.tolist()),
        tuple(checksums.tolist()),
        header_bytes,
        calibration,
        None if packed is None else TokenOrder.unpack(packed, geometry.tokens),
    )


@lru_cache(maxsize=256, typed=True)  # the chunks of a model have one
def _geometry(
    layers: int, kv_heads: int, head_dim: int, dtype: str, tokens: int, frame_tokens: int, period_layers: int
) -> Geometry:
    return Geometry(layers, kv_heads, head_dim, KVDtype(dtype), tokens, frame_tokens, period_layers)


def _bytes_view(data: Buffer) -> memoryview:
    view = memoryview(data)
    return view if view.format == "B" and view.ndim == 1 else view.cast("B")


def _views(parts: Iterable[Buffer] | Buffer) -> list[memoryview]:
    try:
        return [_bytes_view(cast("Buffer", parts))]
    except TypeError:  # not one buffer, hence several
        return [_bytes_view(part) for part in cast("Iterable[Buffer]", parts)]


def _gather(views: Sequence[memoryview], length: int) -> memoryview:
    """The first `length` bytes; a view where they lie in one part."""
    if views and views[0].nbytes >= length:
        return views[0][:length]
    taken = bytearray()
    for view in views:
        taken += view[: length - len(taken)]
        if len(taken) == length:
            break
    return memoryview(taken)


def _pieces(views: Sequence[memoryview], skip: int) -> Iterator[memoryview]:
    """What lies behind the first `skip` bytes, part by part."""
    for view in views:
        if view.nbytes > skip:
            yield view[skip:]
        skip = max(skip - view.nbytes, 0)
