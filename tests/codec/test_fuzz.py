"""Bytes nobody meant: whatever a chunk is turned into, reading it ends soon, in bounded memory, with the right
KV or a CodecError."""

from __future__ import annotations

import struct
import time
from collections.abc import Iterator

import msgpack
import numpy as np
import pytest
import torch
import xxhash

from kvstore_codec.chunk import FIXED_PREFIX_BYTES, ChunkHeader, read_header, verify_chunk
from kvstore_codec.codec import decode_frames
from kvstore_codec.encoding import Encoding
from kvstore_codec.errors import ChunkFormatError, CodecError
from kvstore_codec.model_spec import KVDtype, ModelSpec
from tests.codec.chunks import decoder_of, encode, make_kv, make_spec, same_bits
from tests.codec.fuzzing import SLOWEST_MUTANT_S, bounded_memory, mutate

KV = tuple[torch.Tensor, torch.Tensor]

SEALED = {
    "exact-zstd": (make_spec(layers=1, kv_heads=1, head_dim=16, dtype=KVDtype.FLOAT32), 16),
    "exact-raw": (make_spec(layers=1, kv_heads=1, head_dim=8), 4),
    "high-zstd": (make_spec(layers=2, kv_heads=1, head_dim=16), 20),
    "high-hevc-cpu": (make_spec(layers=1, kv_heads=1, head_dim=32), 20),
    "medium-klt-pco": (make_spec(layers=2, kv_heads=1, head_dim=16), 20),
    "low-klt-zstd": (make_spec(layers=1, kv_heads=2, head_dim=16), 20),
}


@pytest.fixture(autouse=True)
def warm_and_bounded() -> Iterator[None]:
    for encoding, (spec, tokens) in SEALED.items():  # libraries and contexts are not what is measured
        encode(spec, make_kv(spec, tokens), Encoding.parse(encoding))
    with bounded_memory():
        yield


def decode_all(header: ChunkHeader, data: bytes | bytearray) -> KV:
    geometry = header.geometry
    shape = (geometry.layers, geometry.kv_heads, geometry.tokens, geometry.head_dim)
    keys, values = (torch.zeros(shape, dtype=geometry.dtype.torch) for _ in range(2))
    for frame in range(geometry.frame_count):
        period, slot = divmod(frame, geometry.frames_per_period)
        layers, tokens = geometry.layers_of(period), geometry.tokens_of(slot)
        cut = np.s_[layers.start : layers.stop, :, tokens.start : tokens.stop]
        offset, length = header.range_bytes(frame, 1)
        decode_frames(
            header,
            frame,
            1,
            memoryview(data)[offset : offset + length],
            keys[cut],
            values[cut],
            **decoder_of(header),
        )
    return keys, values


def fuzz_whole_chunks(mutants: int) -> None:
    """Mutants as a broken disk or link makes them: noticed, or without effect."""
    spec = make_spec(layers=2, kv_heads=1, head_dim=8)
    data = b"".join(encode(spec, make_kv(spec, tokens=9), Encoding.parse("exact-zstd")).parts)
    wanted = decode_all(read_header(data), data)
    refused = 0
    for _ in range(mutants):
        mutant = mutate(data)
        started = time.monotonic()
        try:
            header = verify_chunk(mutant, len(mutant))
        except ChunkFormatError:
            refused += 1
        else:
            assert same_bits(decode_all(header, mutant), wanted)
        assert time.monotonic() - started < SLOWEST_MUTANT_S
    assert refused > 0.98 * mutants


def fuzz_sealed_frames(encoding: str, spec: ModelSpec, tokens: int, mutants: int) -> None:
    """Mutated frames under true checksums, as a hostile writer makes them: an error or some KV, no more."""
    chunk = encode(spec, make_kv(spec, tokens), Encoding.parse(encoding))
    header, frame = chunk.header, chunk.parts[1]
    assert len(chunk.parts) == 2
    refused = 0
    for _ in range(mutants):
        mutant = mutate(frame)
        sealed = ChunkHeader(
            header.model_digest,
            header.chunk_id,
            header.encoding,
            header.geometry,
            (len(mutant),),
            (xxhash.xxh3_64_intdigest(mutant),),
            0,
        )
        started = time.monotonic()
        try:
            decode_all(sealed, mutant)
        except CodecError:
            refused += 1
        assert time.monotonic() - started < SLOWEST_MUTANT_S
    assert 0 < refused <= mutants


def fuzz_sealed_headers(mutants: int) -> None:
    """Mutated headers under a true checksum."""
    spec = make_spec(layers=2, kv_heads=1, head_dim=8)
    data = encode(spec, make_kv(spec, tokens=9), Encoding.parse("high-zstd")).parts[0]
    fields = msgpack.unpackb(data[FIXED_PREFIX_BYTES:-8])
    refused = 0
    for _ in range(mutants):
        body = bytes(mutate(data[FIXED_PREFIX_BYTES:-8]))
        signed = struct.pack("<4sHI", b"KVC\0", 1, len(body)) + body
        try:
            header = read_header(signed + struct.pack("<Q", xxhash.xxh3_64_intdigest(signed)))
        except ChunkFormatError:
            refused += 1
        else:
            assert len(header.frame_lengths) == header.geometry.frame_count
            assert msgpack.unpackb(body).keys() == fields.keys()
    assert refused > 0.3 * mutants


def test_100_000_mutants_of_a_chunk() -> None:
    fuzz_whole_chunks(100_000)


def test_mutants_with_sealed_headers() -> None:
    fuzz_sealed_headers(20_000)


@pytest.mark.parametrize("encoding", SEALED)
def test_mutants_with_sealed_frames(encoding: str) -> None:
    fuzz_sealed_frames(encoding, *SEALED[encoding], mutants=1_000 if "hevc" in encoding else 5_000)


@pytest.mark.slow
@pytest.mark.parametrize("encoding", SEALED)
def test_many_more_mutants_with_sealed_frames(encoding: str) -> None:
    fuzz_sealed_frames(encoding, *SEALED[encoding], mutants=20_000 if "hevc" in encoding else 100_000)
