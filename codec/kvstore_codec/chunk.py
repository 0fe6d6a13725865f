"""The chunk format.

    magic "KVC\\0" | version u16 | header length u32 | header (msgpack) | xxh3_64 of all that, u64 | frames

All numbers are little-endian. The header names the model, text, context, encoding and geometry, and holds the
length (u32) and the xxh3_64 (u64) of every frame. Frames follow without gaps in the order of `Geometry`.
Their offsets are sums of lengths and are not stored, so they cannot contradict the lengths.

A reader checks every length against a limit or against the number of available bytes before it allocates memory.

Version 2 added a checksum of the decoded samples to every frame (see `payload`). Version 1 is refused: without that
checksum, wrong output of a decoder would not be detected.

A signed chunk also has a digest of every frame in its header, and ends its header with a signature (see `signing`).
"""

from __future__ import annotations

import itertools
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import msgpack  # type: ignore[import-untyped]
import numpy as np
import xxhash
from blake3 import blake3
from typing_extensions import Buffer

from kvstore_codec.bounded import unpack_fields
from kvstore_codec.canonical import require_digest
from kvstore_codec.encoding import Encoding
from kvstore_codec.errors import (
    ChecksumError,
    ChunkFormatError,
    CodecError,
    ForeignChunkError,
    SignatureError,
    TruncatedChunkError,
    UnsupportedVersionError,
)
from kvstore_codec.geometry import Geometry
from kvstore_codec.identity import ChunkId, ContentId, PrefixId
from kvstore_codec.model_spec import KVDtype
from kvstore_codec.signing_keys import SIGNATURE_BYTES, SigningKeys
from kvstore_codec.token_order import TokenOrder

MAGIC = b"KVC\0"
VERSION = 2
MAX_HEADER_BYTES = 1 << 20
FRAME_DIGEST_BYTES = 16

_FIXED_PREFIX = struct.Struct("<4sHI")
FIXED_PREFIX_BYTES = _FIXED_PREFIX.size
_CHECKSUM = struct.Struct("<Q")
_LENGTH_DTYPE, _CHECKSUM_DTYPE = np.dtype("<u4"), np.dtype("<u8")
_GEOMETRY_FIELDS = 7
MAX_FRAME_BYTES = int(np.iinfo(_LENGTH_DTYPE).max)


@dataclass(frozen=True, slots=True)
class ChunkHeader:
    """Parsed header of a chunk. `header_bytes` is the offset of the first frame."""

    model_digest: bytes
    chunk_id: ChunkId
    encoding: Encoding
    geometry: Geometry
    frame_lengths: tuple[int, ...]
    frame_checksums: tuple[int, ...]
    header_bytes: int
    calibration: bytes | None = None
    """Digest of the calibration that the frames were coded with; None if the encoding needs none."""
    token_order: TokenOrder | None = None
    """Ranking of the tokens by importance; None if the worker that stored the chunk gave none."""
    frame_digests: bytes = field(default=b"", repr=False)
    """Of a signed chunk: the first 16 bytes of every frame's blake3, joined."""
    signature: bytes = b""
    """40 bytes; empty if the chunk is not signed."""
    is_verified: bool = field(default=False, compare=False)
    """Whether the signature is that of a key of the reader (`signing.verified`). Then frames must have their digest."""
    _kept_offsets: tuple[int, ...] = field(init=False, repr=False, compare=False, default=())

    @property
    def _offsets(self) -> tuple[int, ...]:
        """Of every frame and of the chunk's end; made when first asked for, because of most chunks that are looked up
        only the lengths are wanted."""
        if not self._kept_offsets:
            offsets = itertools.accumulate(self.frame_lengths, initial=self.header_bytes)
            object.__setattr__(self, "_kept_offsets", tuple(offsets))
        return self._kept_offsets

    @property
    def size_bytes(self) -> int:
        """Size of the whole chunk, header included, in bytes."""
        return self._offsets[-1]

    def frame_offset(self, frame: int) -> int:
        """Offset of the frame's first byte in the chunk. For the number of frames it returns the end of the chunk."""
        return self._offsets[frame]

    def range_bytes(self, first: int, count: int) -> tuple[int, int]:
        """(offset, length) in bytes of `count` consecutive frames. Raises ChunkFormatError outside the chunk."""
        if first < 0 or count < 0 or first + count > len(self.frame_lengths):
            raise ChunkFormatError(
                f"chunk {self.chunk_id.short} has {len(self.frame_lengths)} frames; "
                f"asked for {count} from frame {first}"
            )
        return self._offsets[first], self._offsets[first + count] - self._offsets[first]

    def verify_frame(self, frame: int, data: Buffer) -> None:
        """Verifies a frame's bytes. Raises TruncatedChunkError for a wrong length, ChecksumError for wrong bytes, and
        SignatureError for bytes that were not signed if the header `is_verified`."""
        length = memoryview(data).nbytes
        if length != self.frame_lengths[frame]:
            raise TruncatedChunkError(
                f"chunk {self.chunk_id.short}: frame {frame} has {self.frame_lengths[frame]} bytes, "
                f"got {length}"
            )
        self.compare_checksum(frame, xxhash.xxh3_64_intdigest(data))
        self.compare_digest(frame, data)

    def verify_frames(self, first: int, count: int, data: Buffer) -> None:
        """Verifies the bytes of `count` consecutive frames. Raises what `verify_frame` raises, and ChunkFormatError
        outside the chunk."""
        view, offset = bytes_view(data), self.range_bytes(first, count)[0]
        for frame in range(first, first + count):
            begin = self._offsets[frame] - offset
            self.verify_frame(frame, view[begin : begin + self.frame_lengths[frame]])
        if view.nbytes != self._offsets[first + count] - offset:
            raise TruncatedChunkError(
                f"chunk {self.chunk_id.short}: {count} frames from frame {first} have "
                f"{self._offsets[first + count] - offset} bytes, got {view.nbytes}"
            )

    def require(self, *, model_digest: bytes, chunk_id: ChunkId) -> None:
        """Raises ForeignChunkError if the chunk is not the requested one. The message names what differs."""
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

    def compare_checksum(self, frame: int, found: int) -> None:
        """Raises ChecksumError unless `found` is the frame's xxh3_64."""
        if found != self.frame_checksums[frame]:
            raise ChecksumError(
                f"chunk {self.chunk_id.short}: frame {frame} was damaged "
                f"(xxh3 {found:016x} instead of {self.frame_checksums[frame]:016x})"
            )

    def compare_digest(self, frame: int, *parts: Buffer) -> None:
        """Raises SignatureError if the header `is_verified` and the frame, in parts, is not the one that was signed."""
        begin = frame * FRAME_DIGEST_BYTES
        if (
            self.is_verified
            and frame_digest(*parts) != self.frame_digests[begin : begin + FRAME_DIGEST_BYTES]
        ):
            raise SignatureError(
                f"chunk {self.chunk_id.short}: frame {frame} has the right checksum, but is not the one that was signed"
            )


def frame_digest(*parts: Buffer) -> bytes:
    """Digest of a frame, given in parts, for the header of a signed chunk."""
    hasher = blake3()
    for part in parts:
        hasher.update(part)
    return hasher.digest(length=FRAME_DIGEST_BYTES)


def write_header(
    model_digest: bytes,
    chunk_id: ChunkId,
    encoding: Encoding,
    geometry: Geometry,
    frames: Sequence[Buffer],
    calibration: bytes | None = None,
    token_order: TokenOrder | None = None,
    keys: SigningKeys | None = None,
) -> tuple[ChunkHeader, bytes]:
    """Makes the header of a chunk with these encoded `frames`, signed by the first of `keys`. Returns it parsed and as
    bytes.

    Raises ChunkFormatError for frames or a `token_order` that do not match the geometry."""
    return make_header(
        model_digest,
        chunk_id,
        encoding,
        geometry,
        [memoryview(frame).nbytes for frame in frames],
        [xxhash.xxh3_64_intdigest(frame) for frame in frames],
        calibration,
        token_order,
        None if keys is None else (keys, b"".join(map(frame_digest, frames))),
    )


def make_header(
    model_digest: bytes,
    chunk_id: ChunkId,
    encoding: Encoding,
    geometry: Geometry,
    lengths: Sequence[int],
    checksums: Sequence[int],
    calibration: bytes | None = None,
    token_order: TokenOrder | None = None,
    signed_by: tuple[SigningKeys, bytes] | None = None,
) -> tuple[ChunkHeader, bytes]:
    """As `write_header`, for frames that are not in one buffer each: takes their `lengths` and xxh3_64 `checksums`, and
    for a signed chunk the keys and the joined digests of the frames."""
    if not len(lengths) == len(checksums) == geometry.frame_count or max(lengths) > MAX_FRAME_BYTES:
        raise ChunkFormatError(
            f"chunk {chunk_id.short}: {len(lengths)} frames of up to {max(lengths, default=0)} bytes do not "
            f"make a chunk of {geometry.frame_count} frames of at most {MAX_FRAME_BYTES} bytes"
        )
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
    signature = digests = b""
    if signed_by is not None:
        keys, digests = signed_by
        # The signature comes last, because it covers everything before it.
        fields |= {"digests": digests, "signature": bytes(SIGNATURE_BYTES)}
    body: bytes = msgpack.packb(fields)
    covered = _FIXED_PREFIX.pack(MAGIC, VERSION, len(body)) + body
    if signed_by is not None:
        signature = keys.sign(covered[:-SIGNATURE_BYTES])
        covered = covered[:-SIGNATURE_BYTES] + signature
    data = covered + _CHECKSUM.pack(xxhash.xxh3_64_intdigest(covered))
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
        digests,
        signature,
        is_verified=signed_by is not None,
    )
    return header, data


def header_length(first_bytes: Buffer) -> int:
    """Size of the whole header in bytes, checksum included, read from the first FIXED_PREFIX_BYTES of a chunk.

    Raises ChunkFormatError or a subclass for bytes that do not begin a chunk of this version.
    """
    view = bytes_view(first_bytes)
    if view.nbytes < FIXED_PREFIX_BYTES:
        raise TruncatedChunkError(f"{view.nbytes} bytes are too few for the beginning of a chunk")
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
    """Reads the header of `data`, a chunk or its beginning. Raises ChunkFormatError or a subclass."""
    view = bytes_view(data)
    total = header_length(view)
    if view.nbytes < total:
        raise TruncatedChunkError(
            f"the chunk's header has {total} bytes, but only {view.nbytes} are available"
        )
    signed = view[: total - _CHECKSUM.size]
    (stored,) = _CHECKSUM.unpack_from(view, len(signed))
    if xxhash.xxh3_64_intdigest(signed) != stored:
        raise ChecksumError("the chunk's header was damaged: its checksum does not match")
    try:
        return _parse(unpack_fields(signed[FIXED_PREFIX_BYTES:]), total)
    except ChunkFormatError:
        raise
    # Bytes with a valid checksum may still have any content. Every parse error becomes a ChunkFormatError.
    except (CodecError, ValueError, KeyError, TypeError, msgpack.UnpackException) as error:
        raise ChunkFormatError(f"the chunk's header cannot be read: {repr(error)[:200]}") from error


def _parse(fields: Any, header_bytes: int) -> ChunkHeader:
    dimensions = fields["geometry"]
    if len(dimensions) != _GEOMETRY_FIELDS:
        raise ChunkFormatError(
            f"a chunk's geometry must have {_GEOMETRY_FIELDS} fields, not {len(dimensions)}"
        )
    geometry = _geometry(*dimensions)
    frames, lengths, checksums = geometry.frame_count, fields["lengths"], fields["checksums"]
    if (len(lengths), len(checksums)) != (
        frames * _LENGTH_DTYPE.itemsize,
        frames * _CHECKSUM_DTYPE.itemsize,
    ):
        raise ChunkFormatError(
            f"the header of a chunk of {frames} frames has {len(lengths)} bytes of lengths and {len(checksums)} of "
            "checksums"
        )
    require_digest("the model digest", fields["model"])
    encoding, calibration = Encoding.parse(fields["encoding"]), fields.get("calibration")
    if encoding.needs_calibration != (calibration is not None):
        raise ChunkFormatError(
            f"a chunk in encoding {encoding.name} must {'' if encoding.needs_calibration else 'not '}name a calibration"
        )
    if calibration is not None:
        require_digest("the calibration's digest", calibration)
    packed, digests, signature = fields.get("token_order"), fields.get("digests"), fields.get("signature")
    if digests is not None or signature is not None:
        _require_bytes("digests", digests, frames * FRAME_DIGEST_BYTES)
        _require_bytes("signature", signature, SIGNATURE_BYTES)
    return ChunkHeader(
        fields["model"],
        ChunkId(ContentId(fields["content"]), PrefixId(fields["prefix"])),
        encoding,
        geometry,
        struct.unpack(f"<{frames}I", lengths),
        struct.unpack(f"<{frames}Q", checksums),
        header_bytes,
        calibration,
        None if packed is None else TokenOrder.unpack(packed, geometry.tokens),
        digests or b"",
        signature or b"",
    )


def _require_bytes(what: str, found: object, size_bytes: int) -> None:
    if not isinstance(found, bytes) or len(found) != size_bytes:
        raise ChunkFormatError(f"the {what} of a signed chunk like this one must have {size_bytes} bytes")


@lru_cache(maxsize=256, typed=True)  # all chunks of a model share one
def _geometry(
    layers: int, kv_heads: int, head_dim: int, dtype: str, tokens: int, frame_tokens: int, period_layers: int
) -> Geometry:
    return Geometry(layers, kv_heads, head_dim, KVDtype(dtype), tokens, frame_tokens, period_layers)


def bytes_view(data: Buffer) -> memoryview:
    """The buffer as one row of bytes."""
    view = memoryview(data)
    return view if view.format == "B" and view.ndim == 1 else view.cast("B")
