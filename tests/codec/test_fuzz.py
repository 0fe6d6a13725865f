"""Bytes nobody meant: whatever a chunk is turned into, reading it ends soon, in bounded memory, with the right
KV or a CodecError."""

from __future__ import annotations

import dataclasses
import functools
import struct
from collections.abc import Iterator
from typing import Any

import msgpack
import numpy as np
import pytest
import torch
import xxhash

from kvstore_codec.chunk import FIXED_PREFIX_BYTES, VERSION, ChunkHeader, read_header
from kvstore_codec.codec import decode_frames
from kvstore_codec.encoding import Encoding
from kvstore_codec.errors import ChunkFormatError
from kvstore_codec.model_spec import KVDtype, ModelSpec
from kvstore_codec.payload import PayloadKind
from kvstore_codec.whole_chunk import verify_chunk
from tests.codec.chunks import decoder_of, encode, make_kv, make_spec, same_bits
from tests.codec.fuzzing import bounded_memory, mutate, refused_mutants

KV = tuple[torch.Tensor, torch.Tensor]

# Every kind of payload, and each with every coder whose samples it may hold; one frame each.
SEALED = {
    "exact-zstd": (PayloadKind.BYTE_PLANES, make_spec(1, 1, 16, KVDtype.FLOAT32), 16),
    "exact-raw": (PayloadKind.VERBATIM, make_spec(1, 1, 8), 4),
    "high-zstd": (PayloadKind.QUANTISED, make_spec(2, 1, 16), 20),
    "high-raw": (PayloadKind.QUANTISED, make_spec(2, 1, 16), 20),
    "high-hevc-cpu": (PayloadKind.QUANTISED, make_spec(1, 1, 32), 20),
    "medium-klt-pco": (PayloadKind.KLT, make_spec(2, 1, 16), 20),
    "medium-klt-raw": (PayloadKind.KLT, make_spec(2, 1, 16), 20),
    "low-klt-zstd": (PayloadKind.KLT, make_spec(1, 2, 16), 20),
    "low-klt-hevc-cpu": (PayloadKind.KLT, make_spec(1, 2, 16), 20),
    "low-klt-hevc-cpu-420": (PayloadKind.KLT, make_spec(1, 2, 16), 20),
}


@pytest.fixture(autouse=True)
def warm_and_bounded() -> Iterator[None]:
    for encoding, (_, spec, tokens) in SEALED.items():  # libraries and contexts are not what is measured
        chunk = encode(spec, make_kv(spec, tokens), Encoding.parse(encoding), sinks=2)
        decode_all(chunk.header, b"".join(chunk.parts), decoder_of(chunk.header))
    with bounded_memory():
        yield


def decode_all(header: ChunkHeader, data: bytes | bytearray, decoder: dict[str, Any]) -> KV:
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
            **decoder,
        )
    return keys, values


def fuzz_whole_chunks(mutants: int) -> None:
    """Mutants as a broken disk or link makes them: noticed, or without effect."""
    spec = make_spec(layers=2, kv_heads=1, head_dim=8)
    data = b"".join(encode(spec, make_kv(spec, tokens=9), Encoding.parse("exact-zstd")).parts)
    wanted = decode_all(read_header(data), data, {})

    def read(mutant: bytearray) -> None:
        assert same_bits(decode_all(verify_chunk(mutant, len(mutant)), mutant, {}), wanted)

    assert refused_mutants(read, data, mutants) > 0.98 * mutants


def fuzz_sealed_frames(encoding: str, kind: PayloadKind, spec: ModelSpec, tokens: int, mutants: int) -> None:
    """Mutated frames under true checksums, as a hostile writer makes them: an error or some KV, no more."""
    kv = make_kv(spec, tokens)
    chunk = encode(spec, kv, Encoding.parse(encoding), sinks=2)
    header, frame = chunk.header, chunk.parts[1]
    assert len(chunk.parts) == 2
    assert frame[0] == kind
    sealed, decoder = functools.partial(_sealed, header), decoder_of(header)
    wanted = decode_all(sealed(frame), frame, decoder)
    refused = refused_mutants(lambda mutant: decode_all(sealed(mutant), mutant, decoder), frame, mutants)
    assert 0 < refused < mutants, "some mutants reach the end, or nothing was read"
    assert same_bits(decode_all(sealed(frame), frame, decoder), wanted), "a decoder must work on after errors"


def _sealed(header: ChunkHeader, frame: bytes | bytearray) -> ChunkHeader:
    return dataclasses.replace(
        header,
        frame_lengths=(len(frame),),
        frame_checksums=(xxhash.xxh3_64_intdigest(frame),),
        header_bytes=0,
    )


def fuzz_sealed_headers(mutants: int) -> None:
    """Mutated headers under a true checksum."""
    spec = make_spec(layers=2, kv_heads=1, head_dim=8)
    data = encode(spec, make_kv(spec, tokens=9), Encoding.parse("high-zstd")).parts[0]
    fields = msgpack.unpackb(data[FIXED_PREFIX_BYTES:-8])
    refused = 0
    for _ in range(mutants):
        body = bytes(mutate(data[FIXED_PREFIX_BYTES:-8]))
        signed = struct.pack("<4sHI", b"KVC\0", VERSION, len(body)) + body
        try:
            header = read_header(signed + struct.pack("<Q", xxhash.xxh3_64_intdigest(signed)))
        except ChunkFormatError:
            refused += 1
        else:
            assert len(header.frame_lengths) == header.geometry.frame_count
            assert msgpack.unpackb(body).keys() == fields.keys()
    assert refused > 0.3 * mutants


def test_mutants_of_a_chunk() -> None:
    fuzz_whole_chunks(5_000)


def test_mutants_with_sealed_headers() -> None:
    fuzz_sealed_headers(5_000)


@pytest.mark.parametrize("encoding", SEALED)
def test_mutants_with_sealed_frames(encoding: str) -> None:
    fuzz_sealed_frames(encoding, *SEALED[encoding], mutants=1_000 if "hevc" in encoding else 3_000)


@pytest.mark.slow
def test_100_000_mutants_of_a_chunk() -> None:
    fuzz_whole_chunks(100_000)


@pytest.mark.slow
def test_100_000_mutants_with_sealed_headers() -> None:
    fuzz_sealed_headers(100_000)


@pytest.mark.slow
@pytest.mark.parametrize("encoding", SEALED)
def test_many_more_mutants_with_sealed_frames(encoding: str) -> None:
    fuzz_sealed_frames(encoding, *SEALED[encoding], mutants=2_500 if "hevc" in encoding else 10_000)
