"""What coders make of a frame is checked before it is used: a frame decodes to what was encoded, or not at all."""

from __future__ import annotations

import dataclasses
import functools
import operator
import struct
from collections.abc import Iterator

import numpy as np
import pytest
import torch
import xxhash

from kvstore_codec.chunk import ChunkHeader
from kvstore_codec.codec import EncodedChunk, decode_frames
from kvstore_codec.coders import coder
from kvstore_codec.coders.hevc.base import HevcCoder
from kvstore_codec.coders.hevc.bitstream import nal_units
from kvstore_codec.encoding import Encoding
from kvstore_codec.errors import ChunkFormatError, CodecError, SampleMismatchError
from kvstore_codec.payload import OPENING_BYTES, PayloadKind, sample_checksum
from tests.codec.chunks import ALL_ENCODINGS, decoder_of, encode, make_kv, make_spec, same_bits

SPEC = make_spec(layers=2, kv_heads=2, head_dim=16)
TOKENS = 20
KV = tuple[torch.Tensor, torch.Tensor]
VIDEO = [encoding for encoding in ALL_ENCODINGS if encoding.is_video and encoding.name.startswith("low")]


@functools.cache
def chunk_of(encoding: Encoding) -> EncodedChunk:
    """One frame."""
    return encode(SPEC, make_kv(SPEC, TOKENS), encoding, sinks=2)


def sealed(header: ChunkHeader, frame: bytes) -> ChunkHeader:
    """As whoever changed the frame would write it."""
    return dataclasses.replace(
        header,
        frame_lengths=(len(frame),),
        frame_checksums=(xxhash.xxh3_64_intdigest(frame),),
        header_bytes=0,
    )


def decoded(chunk: EncodedChunk, frame: bytes, *, fill: float = 0.0) -> KV:
    shape = chunk.header.geometry.frame_shape(0)
    keys, values = (torch.full(shape, fill, dtype=SPEC.dtype.torch) for _ in range(2))
    decode_frames(sealed(chunk.header, frame), 0, 1, frame, keys, values, **decoder_of(chunk.header))
    return keys, values


def with_checksum(frame: bytes, checksum: int) -> bytes:
    return frame[:1] + struct.pack("<Q", checksum) + frame[OPENING_BYTES:]


def checksum_of(frame: bytes) -> int:
    return int(struct.unpack_from("<Q", frame, 1)[0])


@pytest.mark.parametrize("encoding", ALL_ENCODINGS, ids=operator.attrgetter("name"))
def test_samples_other_than_those_encoded_are_refused(encoding: Encoding) -> None:
    chunk = chunk_of(encoding)
    frame = chunk.parts[1]
    wanted = decoded(chunk, frame)
    for bit in (0, 31, 63):
        with pytest.raises(SampleMismatchError, match="other samples than were encoded") as caught:
            decoded(chunk, with_checksum(frame, checksum_of(frame) ^ 1 << bit))
        assert "frame 0" in caught.value.__notes__[0]
    assert same_bits(decoded(chunk, frame), wanted), "a decoder must work on after errors"


@pytest.mark.parametrize(
    "encoding", [e for e in ALL_ENCODINGS if e.rate != "exact"], ids=operator.attrgetter("name")
)
def test_lossy_frames_write_nothing_before_their_samples_are_known_to_be_right(encoding: Encoding) -> None:
    chunk = chunk_of(encoding)
    frame, header = chunk.parts[1], chunk.header
    bad = with_checksum(frame, checksum_of(frame) ^ 1)
    keys, values = (torch.full(header.geometry.frame_shape(0), 7.0, dtype=SPEC.dtype.torch) for _ in range(2))
    with pytest.raises(SampleMismatchError):
        decode_frames(sealed(header, bad), 0, 1, bad, keys, values, **decoder_of(header))
    assert bool((keys == 7).all())
    assert bool((values == 7).all())


def test_the_checksum_is_that_of_the_samples_behind_256_zeros() -> None:
    frame = encode(SPEC, make_kv(SPEC, TOKENS), Encoding.parse("low-klt-raw")).parts[1]
    kind, checksum, _, rows, exact_tokens, escapes = struct.unpack_from("<BQfHHI", frame)
    assert (kind, exact_tokens, escapes) == (PayloadKind.KLT, 0, 0)
    samples = frame[struct.calcsize("<BQfHHI") :]
    assert len(samples) == rows * TOKENS
    assert checksum == xxhash.xxh3_64_intdigest(bytes(256) + samples)
    verbatim = chunk_of(Encoding.parse("exact-raw")).parts[1]
    assert verbatim[0] == PayloadKind.VERBATIM
    assert checksum_of(verbatim) == xxhash.xxh3_64_intdigest(bytes(256)), "no coder, no samples"


def test_no_sample_hides_its_neighbours() -> None:
    """xxh3 multiplies the first two words of 32 bytes, each xor a public number. That number as a word is a factor of
    zero, and whatever stands beside it has the same digest."""
    factor_of_zero = struct.pack("<Q", 0xBE4BA423396CFEB8)
    one, other = (
        np.frombuffer(factor_of_zero + beside + bytes(16), np.uint8) for beside in (b"secret A", b"secret B")
    )
    assert xxhash.xxh3_64_intdigest(one) == xxhash.xxh3_64_intdigest(other), "else this tests nothing"
    assert sample_checksum(one) != sample_checksum(other)


def mutants(stream: bytes, number: int) -> Iterator[bytes]:
    """Flipped bits and zeroed or cut ends behind the parameter sets."""
    rng = np.random.default_rng(14)
    first = len(stream) // 3
    for _ in range(number):
        mutant = bytearray(stream)
        at = int(rng.integers(first, len(mutant)))
        match rng.integers(0, 3):
            case 0:
                mutant[at] ^= 1 << int(rng.integers(0, 8))
            case 1:
                mutant[at:] = bytes(len(mutant) - at)
            case 2:
                del mutant[at:]
        yield bytes(mutant)


@pytest.mark.parametrize("encoding", VIDEO, ids=operator.attrgetter("name"))
def test_damaged_video_is_right_or_refused(encoding: Encoding, one_thread: None) -> None:
    """FFmpeg takes many damaged pictures without a word. Other chunks are decoded in between: none of theirs shows."""
    chunk = chunk_of(encoding)
    frame = chunk.parts[1]
    wanted, refused = decoded(chunk, frame), 0
    other = encode(SPEC, make_kv(SPEC, TOKENS, seed=5), encoding)
    for mutant in mutants(frame, 100):
        decoded(other, other.parts[1])
        try:
            assert same_bits(decoded(chunk, mutant), wanted)
        except CodecError:
            refused += 1
    assert refused > 50


def test_a_decoder_does_not_go_on_with_parameter_sets_of_an_earlier_stream() -> None:
    """With its own unreadable, FFmpeg would take the last one of that number, and give another tenant's settings."""
    shape = (1, 1, 144, 144)
    hevc = coder("hevc-cpu")
    assert isinstance(hevc, HevcCoder)
    stream, out = hevc.encode_pictures(np.full(shape, 7, np.uint8)), np.empty(shape, np.uint8)
    pps, first_slice = (unit.start for unit in list(nal_units(stream))[2:4])
    unreadable = stream[:pps] + b"\0\0\1\x44\1\xd0" + stream[first_slice:]
    for _ in range(2):
        hevc.decode_pictures(stream, out)
        with pytest.raises(ChunkFormatError):
            hevc.decode_pictures(unreadable, out)


def test_the_memory_of_decoded_pictures_is_cleared_after_use() -> None:
    shape = (2, 3, 144, 144)
    pictures = np.random.default_rng(3).integers(1, 256, shape, np.uint8)
    hevc = coder("hevc-cpu")
    assert isinstance(hevc, HevcCoder)
    planes = []
    for picture, decoded_planes in zip(
        pictures, hevc.decoded(hevc.encode_pictures(pictures), shape), strict=True
    ):
        assert all(
            np.array_equal(plane[:, :144], samples)
            for plane, samples in zip(decoded_planes, picture, strict=True)
        )
        planes += decoded_planes
    assert len(planes) == 6
    assert not any(plane.any() for plane in planes)
