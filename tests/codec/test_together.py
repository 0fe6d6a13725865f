"""Ranges of several chunks, restored together."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore_codec.codec import EncodedChunk
from kvstore_codec.decoding import FramesTogether
from kvstore_codec.encoding import Encoding
from kvstore_codec.errors import CalibrationError, ChecksumError, ChunkFormatError, InvalidKVError
from kvstore_codec.klt_frames import KLT
from kvstore_codec.model_spec import KVDtype, ModelSpec
from kvstore_codec.payload import PayloadKind
from tests.codec.chunks import decode, encode, features_of, klt_of, make_kv, make_spec, same_bits

KV = tuple[torch.Tensor, torch.Tensor]
MEDIUM, EXACT = Encoding.parse("medium-klt-pco"), Encoding.parse("exact-zstd")


def outputs(spec: ModelSpec, tokens: int) -> KV:
    shape = (spec.layers, spec.kv_heads, tokens, spec.head_dim)
    keys, values = (torch.full(shape, float("nan"), dtype=spec.dtype.torch) for _ in range(2))
    return keys, values


def read(
    together: FramesTogether,
    chunk: EncodedChunk,
    period: int,
    out: KV,
    klt: KLT | None,
    change: Callable[[bytes], bytes] = bytes,
) -> None:
    """A whole period of a chunk."""
    header = chunk.header
    per_period, layers = header.geometry.frames_per_period, header.geometry.layers_of(period)
    first = period * per_period
    together.read(
        header,
        first,
        per_period,
        change(b"".join(chunk.parts[1 + first : 1 + first + per_period])),
        *(tensor[layers.start : layers.stop] for tensor in out),
        klt=klt,
        prediction=klt.predict(features_of(header.geometry.tokens)) if klt else None,
    )


def close(one: KV, other: KV) -> bool:
    """Up to the rounding of sums that were added up in another order."""
    tolerance = 2 * torch.finfo(torch.bfloat16).eps
    return all(
        torch.allclose(a.float(), b.float(), rtol=tolerance, atol=tolerance)
        for a, b in zip(one, other, strict=True)
    )


@settings(max_examples=10, deadline=None)
@given(
    layers=st.integers(1, 6),
    tokens=st.lists(st.integers(1, 400), min_size=1, max_size=4),
    dtype=st.sampled_from([KVDtype.BFLOAT16, KVDtype.FLOAT32]),
    encodings=st.lists(st.sampled_from([MEDIUM, EXACT]), min_size=4, max_size=4),
)
def test_chunks_restored_together_are_what_they_are_one_by_one(
    layers: int, tokens: list[int], dtype: KVDtype, encodings: list[Encoding]
) -> None:
    spec = make_spec(layers, dtype=dtype)
    klt = klt_of(spec)
    chunks = []
    for index, (count, encoding) in enumerate(zip(tokens, encodings, strict=False)):
        keys, values = make_kv(spec, count, seed=index)
        keys[-1, 0, count // 2] += 200  # escapes
        values[0, 0, count // 3, 1] = float("inf")  # one frame stays exact
        chunks.append(encode(spec, (keys, values), encoding, sinks=2))
    results = [outputs(spec, count) for count in tokens]
    for period in range(chunks[0].header.geometry.periods):
        together = FramesTogether()
        for chunk, out in zip(chunks, results, strict=True):
            assert together.takes(chunk.header, period * chunk.header.geometry.frames_per_period, klt)
            read(together, chunk, period, out, klt if chunk.header.calibration else None)
        together.restore_()
        assert not together.tokens
    for chunk, out in zip(chunks, results, strict=True):
        assert close(out, decode(chunk))
        if chunk.header.calibration is None:
            assert same_bits(out, decode(chunk))


def test_bad_bytes_of_one_chunk_leave_the_others_alone() -> None:
    spec = make_spec(layers=4)
    klt = klt_of(spec)
    chunks = [encode(spec, make_kv(spec, 128, seed=seed), MEDIUM) for seed in range(3)]
    results = [outputs(spec, 128) for _ in chunks]
    together = FramesTogether()
    read(together, chunks[0], 0, results[0], klt)
    with pytest.raises(ChecksumError):
        read(together, chunks[1], 0, results[1], klt, lambda data: data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(ChunkFormatError, match="too many"):
        read(together, chunks[1], 0, results[1], klt, lambda data: data + b"!")
    assert together.tokens == 128
    read(together, chunks[2], 0, results[2], klt)
    together.restore_()
    assert close(results[0], decode(chunks[0]))
    assert close(results[2], decode(chunks[2]))
    assert all(tensor.isnan().all() for tensor in results[1])


def test_a_range_may_be_read_before_the_bytes_of_the_last_are_overwritten() -> None:
    spec = make_spec(layers=4)
    chunk = encode(spec, make_kv(spec, 64), MEDIUM)
    out, buffer = outputs(spec, 64), bytearray(chunk.parts[1])
    together = FramesTogether()
    klt = klt_of(spec)
    together.read(
        chunk.header, 0, 1, memoryview(buffer), *out, klt=klt, prediction=klt.predict(features_of(64))
    )
    buffer[:] = bytes(len(buffer))
    together.restore_()
    assert same_bits(out, decode(chunk))


def test_frames_of_other_periods_and_calibrations_wait_until_these_are_restored() -> None:
    spec = make_spec(layers=8)
    klt = klt_of(spec)
    chunk = encode(spec, make_kv(spec, 64), MEDIUM)
    exact = encode(spec, make_kv(spec, 64), EXACT)
    assert [part[0] for part in chunk.parts[1:]] == [PayloadKind.KLT] * 2
    out, other = outputs(spec, 64), outputs(spec, 64)
    together = FramesTogether()
    read(together, chunk, 0, out, klt)
    same = KLT(dataclasses.replace(klt.calibration))
    for first, calibration in ((1, klt), (0, same)):
        assert not together.takes(chunk.header, first, calibration)
        with pytest.raises(InvalidKVError, match="together"):
            read(together, chunk, first, out, calibration)
    for period in range(2):  # needs no restoring
        assert together.takes(exact.header, period, None)
        read(together, exact, period, other, None)
    together.restore_()
    assert same_bits(other, decode(exact))
    read(together, chunk, 1, out, klt)
    together.restore_()
    assert close(out, decode(chunk))


def test_a_range_without_its_calibration_does_not_wait() -> None:
    spec = make_spec(layers=4)
    chunk = encode(spec, make_kv(spec, 64), MEDIUM)
    together = FramesTogether()
    with pytest.raises(CalibrationError, match="kvstore calibrate"):
        read(together, chunk, 0, outputs(spec, 64), None)
    assert not together.tokens
