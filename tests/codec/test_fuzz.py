"""Bytes nobody meant: whatever a chunk is turned into, reading it ends soon, in bounded memory, with the right
KV or a CodecError."""

from __future__ import annotations

import resource
import struct
import time
from collections.abc import Iterator
from pathlib import Path

import msgpack
import numpy as np
import pytest
import torch
import xxhash

from kvstore_codec.chunk import FIXED_PREFIX_BYTES, ChunkHeader, read_header, verify_chunk
from kvstore_codec.codec import decode_frame
from kvstore_codec.encoding import Encoding
from kvstore_codec.errors import ChunkFormatError, CodecError
from kvstore_codec.model_spec import KVDtype, ModelSpec
from tests.codec.chunks import encode, make_kv, make_spec, same_bits

RNG = np.random.default_rng(2024)
KV = tuple[torch.Tensor, torch.Tensor]
# Far below the gigabytes that the length fields of a mutant may ask for.
EXTRA_MEMORY_BYTES = 64 << 20
SLOWEST_MUTANT_S = 5.0

SEALED = {
    "exact-zstd": (make_spec(layers=1, kv_heads=1, head_dim=16, dtype=KVDtype.FLOAT32), 16),
    "exact-raw": (make_spec(layers=1, kv_heads=1, head_dim=8), 4),
    "high-zstd": (make_spec(layers=2, kv_heads=1, head_dim=16), 20),
    "high-hevc-cpu": (make_spec(layers=1, kv_heads=1, head_dim=32), 20),
}


@pytest.fixture(autouse=True)
def bounded_memory() -> Iterator[None]:
    """An allocation that follows a false length fails with MemoryError, and the test with it."""
    for encoding, (spec, tokens) in SEALED.items():  # libraries and contexts are not what is measured
        encode(spec, make_kv(spec, tokens), Encoding.parse(encoding))
    in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (in_use + EXTRA_MEMORY_BYTES, hard))
    yield
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def mutate(data: bytes) -> bytearray:
    """One to four edits: flipped bits, other bytes, extreme integers, cuts, insertions, repeated stretches."""
    mutant = bytearray(data)
    for _ in range(RNG.integers(1, 5)):
        at = int(RNG.integers(0, max(1, len(mutant))))
        length = int(RNG.integers(1, 9))
        match RNG.integers(0, 7):
            case 0 if mutant:
                mutant[at] ^= 1 << int(RNG.integers(0, 8))
            case 1:
                mutant[at : at + length] = RNG.bytes(length)
            case 2:
                mutant[at : at + 4] = struct.pack("<I", int(RNG.choice([0, 1, 2**31, 2**32 - 1, len(data)])))
            case 3:
                del mutant[at : at + length]
            case 4:
                mutant[at:at] = RNG.bytes(length)
            case 5:
                del mutant[at:]
            case 6:
                mutant[at:at] = mutant[at : at + 64]
    return mutant


def decode_all(header: ChunkHeader, data: bytes | bytearray) -> KV:
    geometry = header.geometry
    shape = (geometry.layers, geometry.kv_heads, geometry.tokens, geometry.head_dim)
    keys, values = (torch.zeros(shape, dtype=geometry.dtype.torch) for _ in range(2))
    for frame in range(geometry.frame_count):
        period, slot = divmod(frame, geometry.frames_per_period)
        layers, tokens = geometry.layers_of(period), geometry.tokens_of(slot)
        cut = np.s_[layers.start : layers.stop, :, tokens.start : tokens.stop]
        offset, length = header.range_bytes(frame, 1)
        decode_frame(header, frame, memoryview(data)[offset : offset + length], keys[cut], values[cut])
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
