from __future__ import annotations

import functools
import itertools
import struct
import tracemalloc
from collections.abc import Callable
from typing import Any

import msgpack
import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore_codec.chunk import (
    FIXED_PREFIX_BYTES,
    MAX_HEADER_BYTES,
    header_length,
    read_header,
    write_header,
)
from kvstore_codec.codec import EncodedChunk
from kvstore_codec.encoding import Encoding
from kvstore_codec.errors import (
    ChecksumError,
    ChunkFormatError,
    ForeignChunkError,
    TruncatedChunkError,
    UnsupportedVersionError,
)
from kvstore_codec.identity import ChunkId, ContentId, PrefixId
from kvstore_codec.whole_chunk import verify_chunk
from tests.codec.chunks import CHUNK_ID, encode, make_kv, make_spec

SPEC = make_spec(layers=5, kv_heads=1, head_dim=8)


@functools.cache
def small_chunk() -> EncodedChunk:
    return encode(SPEC, make_kv(SPEC, tokens=70), Encoding.parse("exact-zstd"))


def small_chunk_bytes() -> bytes:
    return b"".join(small_chunk().parts)


def reseal(body: bytes, version: int = 2) -> bytes:
    signed = struct.pack("<4sHI", b"KVC\0", version, len(body)) + body
    return signed + struct.pack("<Q", xxhash.xxh3_64_intdigest(signed))


def with_fields(**changes: Any) -> bytes:
    """The header of the small chunk with other fields, sound checksum included."""
    header = small_chunk().parts[0]
    return reseal(msgpack.packb(msgpack.unpackb(header[FIXED_PREFIX_BYTES:-8]) | changes))


def test_layout_byte_by_byte() -> None:
    chunk = small_chunk()
    data = small_chunk_bytes()
    magic, version, length = struct.unpack_from("<4sHI", data)
    assert (magic, version) == (b"KVC\0", 2)
    header_end = 10 + length + 8
    assert struct.unpack_from("<Q", data, header_end - 8)[0] == xxhash.xxh3_64_intdigest(
        data[: header_end - 8]
    )
    fields = msgpack.unpackb(data[10 : header_end - 8])
    assert fields["model"] == SPEC.digest
    assert (fields["content"], fields["prefix"]) == (CHUNK_ID.content_id, CHUNK_ID.prefix_id)
    assert fields["encoding"] == "exact-zstd"
    assert fields["geometry"] == [5, 1, 8, "bfloat16", 70, 64, 4]
    frames = chunk.parts[1:]
    assert np.frombuffer(fields["lengths"], "<u4").tolist() == [len(frame) for frame in frames]
    assert np.frombuffer(fields["checksums"], "<u8").tolist() == [xxhash.xxh3_64_intdigest(f) for f in frames]
    assert data[header_end:] == b"".join(frames)
    assert len(frames) == 4


def test_header_reads_back_from_the_chunk_and_from_its_beginning() -> None:
    chunk, data = small_chunk(), small_chunk_bytes()
    assert read_header(data) == read_header(chunk.parts[0]) == chunk.header
    assert header_length(data[:FIXED_PREFIX_BYTES]) == chunk.header.header_bytes == len(chunk.parts[0])
    assert chunk.size_bytes == chunk.header.size_bytes == len(data)
    assert (
        read_header(memoryview(bytearray(data))) == read_header(np.frombuffer(data, np.uint8)) == chunk.header
    )


def test_offsets_and_ranges_point_at_the_frames() -> None:
    chunk, data = small_chunk(), small_chunk_bytes()
    frames = chunk.parts[1:]
    for frame, content in enumerate(frames):
        start = chunk.header.frame_offset(frame)
        assert data[start : start + len(content)] == content
        chunk.header.verify_frame(frame, content)
    for first in range(len(frames) + 1):
        for count in range(len(frames) + 1 - first):
            offset, length = chunk.header.range_bytes(first, count)
            assert data[offset : offset + length] == b"".join(frames[first : first + count])
    assert chunk.header.frame_offset(len(frames)) == len(data)
    for first, count in ((-1, 1), (0, 5), (4, 1), (5, 0), (1, -1)):
        with pytest.raises(ChunkFormatError):
            chunk.header.range_bytes(first, count)


def test_frames_are_verified() -> None:
    header, frame = small_chunk().header, small_chunk().parts[1]
    with pytest.raises(TruncatedChunkError, match="frame 0"):
        header.verify_frame(0, frame[:-1])
    with pytest.raises(TruncatedChunkError):
        header.verify_frame(0, frame + b"\0")
    with pytest.raises(ChecksumError, match="frame 0"):
        header.verify_frame(0, bytes([frame[0] ^ 1]) + frame[1:])


def test_a_chunk_of_another_model_text_or_context_is_foreign() -> None:
    header = small_chunk().header
    header.require(model_digest=SPEC.digest, chunk_id=CHUNK_ID)
    other = bytes(32)
    for what, digest, chunk_id in (
        ("model", other, CHUNK_ID),
        ("content", SPEC.digest, ChunkId(ContentId(other), CHUNK_ID.prefix_id)),
        ("context", SPEC.digest, ChunkId(CHUNK_ID.content_id, PrefixId(other))),
    ):
        with pytest.raises(ForeignChunkError, match=f"another {what}"):
            header.require(model_digest=digest, chunk_id=chunk_id)


def test_truncation_at_every_byte_is_noticed() -> None:
    data, header = small_chunk_bytes(), small_chunk().header
    for length in range(len(data)):
        with pytest.raises(TruncatedChunkError):
            verify_chunk(data[:length], len(data))
        with pytest.raises(TruncatedChunkError):
            verify_chunk([data[:length]], length)
        if length < header.header_bytes:
            with pytest.raises(TruncatedChunkError):
                read_header(data[:length])


def test_every_flipped_bit_is_noticed() -> None:
    data = small_chunk_bytes()
    for position in range(len(data)):
        damaged = bytearray(data)
        damaged[position] ^= 1 << (position % 8)
        with pytest.raises(ChunkFormatError):
            verify_chunk(damaged, len(damaged))


@settings(deadline=None)
@given(cuts=st.lists(st.integers(0, 2000), max_size=30))
def test_a_scattered_chunk_is_the_same_chunk(cuts: list[int]) -> None:
    data = small_chunk_bytes()
    edges = sorted({0, len(data), *(cut % len(data) for cut in cuts)})
    parts = [data[a:b] for a, b in itertools.pairwise(edges)] + [b""]
    assert verify_chunk(parts, len(data)) == small_chunk().header
    assert verify_chunk(iter([*parts, b"what lies in the last block behind the chunk"]), len(data))


def test_a_wrong_size_is_noticed() -> None:
    data = small_chunk_bytes()
    with pytest.raises(TruncatedChunkError):
        verify_chunk(data + b"\0", len(data) + 1)
    with pytest.raises(TruncatedChunkError):
        verify_chunk([], 1)


@pytest.mark.parametrize("foreign", [b"", b"KVC", b"\0" * 100, b"\x89PNG\r\n\x1a\n" * 20, b"{}" * 50])
def test_foreign_bytes_are_refused(foreign: bytes) -> None:
    for read in (read_header, header_length, lambda data: verify_chunk(data, len(data))):
        with pytest.raises(ChunkFormatError):
            read(foreign)


@pytest.mark.parametrize("version", [1, 3])
def test_another_version_is_refused_by_name(version: int) -> None:
    data = bytearray(small_chunk_bytes())
    data[4:6] = struct.pack("<H", version)
    with pytest.raises(UnsupportedVersionError, match=f"version {version}, this codec reads version 2"):
        read_header(data)


def test_an_absurd_header_length_is_refused_without_allocating() -> None:
    for length in (MAX_HEADER_BYTES, 2**32 - 1):
        data = struct.pack("<4sHI", b"KVC\0", 2, length) + bytes(100)
        with pytest.raises(ChunkFormatError, match="absurd"):
            read_header(data)


def set_geometry(index: int, value: object) -> Callable[[], bytes]:
    def make() -> bytes:
        geometry: list[Any] = [5, 1, 8, "bfloat16", 70, 64, 4]
        geometry[index] = value
        return with_fields(geometry=geometry)

    return make


@pytest.mark.parametrize(
    "make",
    [
        *(set_geometry(index, 2**31) for index in (0, 1, 2, 4, 5, 6)),
        *(set_geometry(index, 0) for index in (0, 1, 2, 4, 5, 6)),
        *(set_geometry(index, None) for index in range(7)),
        set_geometry(0, 9),  # more frames than indexed
        set_geometry(3, "int8"),
        lambda: with_fields(geometry=[5, 1, 8]),
        lambda: with_fields(geometry=7),
        lambda: with_fields(model=b"short"),
        lambda: with_fields(model="a" * 32),
        lambda: with_fields(content=bytes(33)),
        lambda: with_fields(prefix=None),
        lambda: with_fields(encoding="low-magic"),
        lambda: with_fields(encoding=[]),
        lambda: with_fields(lengths=b""),
        lambda: with_fields(lengths=b"123"),
        lambda: with_fields(lengths="text"),
        lambda: with_fields(checksums=bytes(8 * 5)),
        lambda: reseal(msgpack.packb([1, 2, 3])),
        lambda: reseal(msgpack.packb({})),
        lambda: reseal(b""),
        lambda: reseal(b"\xc1"),
        lambda: reseal(b"\xdf\xff\xff\xff\xff"),  # a map of 4 billion entries
        lambda: reseal(b"\xc6\xff\xff\xff\xff"),  # 4 GiB of bytes
        lambda: reseal(b"\x91" * 5000),  # nested deeply
        lambda: reseal(msgpack.packb({"geometry": {}}) + b"more"),
        lambda: reseal(b"\x81\x81\x01\x02\x03"),  # a map as a key
        lambda: reseal(b"\xa4\xff\xff\xff\xff"),  # text that is not UTF-8
    ],
)
def test_a_sealed_header_that_makes_no_sense_is_refused(make: Callable[[], bytes]) -> None:
    data = make()
    tracemalloc.start()
    try:
        with pytest.raises(ChunkFormatError):
            read_header(data)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_frame_lengths_that_add_up_to_more_than_there_is_are_noticed() -> None:
    header = with_fields(lengths=np.full(4, 2**32 - 1, "<u4").tobytes())
    data = header + b"".join(small_chunk().parts[1:])
    assert read_header(data).size_bytes > 2**33
    with pytest.raises(TruncatedChunkError):
        verify_chunk(data, len(data))


def test_a_header_needs_one_entry_per_frame() -> None:
    with pytest.raises(ChunkFormatError, match="4 frames"):
        write_header(
            SPEC.digest, CHUNK_ID, Encoding.parse("exact-raw"), small_chunk().header.geometry, [b"one frame"]
        )
