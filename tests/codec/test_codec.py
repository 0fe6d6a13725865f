from __future__ import annotations

import dataclasses
import operator
import threading

import numpy as np
import pytest
import torch
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore_codec.codec import EncodedChunk, decode_frames
from kvstore_codec.encoding import Encoding, Rate
from kvstore_codec.errors import (
    ChecksumError,
    ChunkFormatError,
    CodecError,
    InvalidKVError,
    TruncatedChunkError,
)
from kvstore_codec.model_spec import KVDtype, ModelSpec
from kvstore_codec.quantise import STEP_PER_RMS
from tests.codec.chunks import (
    ALL_ENCODINGS,
    WORD_DTYPES,
    bits,
    decode,
    decoder_of,
    encode,
    make_kv,
    make_spec,
    same_bits,
)

EXACT = [Encoding.parse(name) for name in ("exact-zstd", "exact-raw")]
HIGH = [Encoding.parse(name) for name in ("high-zstd", "high-hevc-cpu", "high-raw")]
KV = tuple[torch.Tensor, torch.Tensor]

shapes = st.fixed_dictionaries(
    {
        "layers": st.integers(1, 6),
        "kv_heads": st.integers(1, 16),
        "head_dim": st.sampled_from([32, 48, 64, 80, 128, 256]),
        "dtype": st.sampled_from(list(KVDtype)),
    }
)


def any_bits(spec: ModelSpec, tokens: int, seed: int) -> KV:
    """Every float there is: NaN payloads, infinities, denormals, -0.0."""
    generator = torch.Generator().manual_seed(seed)
    words = WORD_DTYPES[spec.dtype.itemsize]
    limits = torch.iinfo(words)
    shape = (2, spec.layers, spec.kv_heads, tokens, spec.head_dim)
    drawn = torch.randint(limits.min, limits.max + 1, shape, generator=generator, dtype=torch.int64).to(words)
    keys, values = drawn.view(spec.dtype.torch)
    return keys, values


def frame_cuts(chunk: EncodedChunk) -> list[tuple[slice, slice]]:
    """(layers, tokens) of the frames, in order."""
    geometry = chunk.header.geometry
    cuts = []
    for frame in range(geometry.frame_count):
        period, slot = divmod(frame, geometry.frames_per_period)
        layers, tokens = geometry.layers_of(period), geometry.tokens_of(slot)
        cuts.append((slice(layers.start, layers.stop), slice(tokens.start, tokens.stop)))
    return cuts


@settings(max_examples=60, deadline=None)
@given(shape=shapes, tokens=st.integers(1, 150), seed=st.integers(0, 99), encoding=st.sampled_from(EXACT))
def test_exact_keeps_every_bit_of_any_float(
    shape: dict[str, int], tokens: int, seed: int, encoding: Encoding
) -> None:
    spec = make_spec(**shape)
    for kv in (any_bits(spec, tokens, seed), make_kv(spec, tokens, seed)):
        assert same_bits(decode(encode(spec, kv, encoding)), kv)


@pytest.mark.parametrize("dtype", [KVDtype.BFLOAT16, KVDtype.FLOAT16])
def test_exact_keeps_all_65536_words(dtype: KVDtype) -> None:
    spec = make_spec(layers=1, kv_heads=4, head_dim=128, dtype=dtype)
    words = torch.arange(-(2**15), 2**15).to(torch.int16).view(1, 4, 128, 128).view(dtype.torch)
    for encoding in EXACT:
        assert same_bits(decode(encode(spec, (words, words.flip(2)), encoding)), (words, words.flip(2)))


@pytest.mark.parametrize("dtype", list(KVDtype))
def test_exact_shrinks_exponents_and_leaves_mantissas_alone(dtype: KVDtype) -> None:
    spec = make_spec(layers=4, kv_heads=3, head_dim=64, dtype=dtype)
    kv = make_kv(spec, 256)
    raw_bytes = 2 * kv[0].nbytes
    share = encode(spec, kv, EXACT[0]).size_bytes / raw_bytes
    assert share < {KVDtype.BFLOAT16: 0.76, KVDtype.FLOAT16: 0.92, KVDtype.FLOAT32: 0.88}[dtype]
    noise = encode(spec, any_bits(spec, 256, 0), EXACT[0]).size_bytes
    assert noise < 1.01 * raw_bytes, "noise must not expand"


def test_exact_finds_floats_that_hold_less_than_they_could() -> None:
    spec = make_spec(layers=4, kv_heads=3, head_dim=64, dtype=KVDtype.FLOAT32)
    keys, values = make_kv(spec, 64)
    kv = keys.bfloat16().float(), values.bfloat16().float()
    chunk = encode(spec, kv, EXACT[0])
    assert chunk.size_bytes < 0.4 * 2 * keys.nbytes
    assert same_bits(decode(chunk), kv)


@settings(max_examples=15, deadline=None)
@given(shape=shapes, tokens=st.integers(2, 100), seed=st.integers(0, 99))
def test_high_stays_within_half_a_step(shape: dict[str, int], tokens: int, seed: int) -> None:
    spec = make_spec(**shape)
    kv = make_kv(spec, tokens, seed)
    chunks = [encode(spec, kv, encoding) for encoding in HIGH]
    results = [decode(chunk) for chunk in chunks]
    assert same_bits(results[0], results[1]), "all coders carry the same integers"
    assert same_bits(results[0], results[2])
    rounding = torch.finfo(spec.dtype.torch).eps / 2
    for original, restored in zip(kv, results[0], strict=True):
        for layers, rows in frame_cuts(chunks[0]):
            x, y = original[layers, :, rows].double(), restored[layers, :, rows].double()
            residual = x - x.mean(2, keepdim=True)
            step = STEP_PER_RMS[Rate.HIGH] * residual.square().mean((1, 2, 3), keepdim=True).sqrt()
            bound = 0.5 * step + rounding * y.abs() + 1e-5 * (step + y.abs())
            assert ((x - y).abs() <= bound).all()


@pytest.mark.parametrize("dtype", list(KVDtype))
def test_high_takes_under_five_bits_and_spreads_the_error_evenly(dtype: KVDtype) -> None:
    spec = make_spec(layers=4, kv_heads=3, head_dim=64, dtype=dtype)
    kv = make_kv(spec, 256)
    chunk = encode(spec, kv, HIGH[0])
    assert 4 < chunk.size_bytes * 8 / (2 * kv[0].numel()) < 5
    for original, restored in zip(kv, decode(chunk), strict=True):
        x, y = original.double(), restored.double()
        residual_rms = (x - x.mean(2, keepdim=True)).square().mean().sqrt()
        error_rms = (x - y).square().mean().sqrt()
        assert error_rms / residual_rms == pytest.approx(STEP_PER_RMS[Rate.HIGH] / 12**0.5, rel=0.05)


@pytest.mark.parametrize("encoding", HIGH, ids=operator.attrgetter("name"))
@pytest.mark.parametrize("dtype", list(KVDtype))
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_frame_that_is_not_finite_stays_exact_and_its_neighbours_lossy(
    encoding: Encoding, dtype: KVDtype, bad: float
) -> None:
    spec = make_spec(layers=5, dtype=dtype)
    kv = make_kv(spec, 130)
    kv[1][1, 0, 70, 3] = bad
    chunk = encode(spec, kv, encoding)
    restored = decode(chunk)
    kept = [
        same_bits((restored[0][a, :, b], restored[1][a, :, b]), (kv[0][a, :, b], kv[1][a, :, b]))
        for a, b in frame_cuts(chunk)
    ]
    assert kept == [False, True, False, False, False, False]


def test_an_outlier_beyond_8_bits_is_kept_as_an_escape() -> None:
    spec = make_spec(layers=1, kv_heads=4, head_dim=64, dtype=KVDtype.FLOAT32)
    keys, values = make_kv(spec, 64)
    plain = encode(spec, (keys, values), HIGH[0])
    keys[0, 2, 17, 5] = 500.0
    values[0, 3, 63, 63] = -700.0
    for encoding in HIGH:
        chunk = encode(spec, (keys, values), encoding)
        restored = decode(chunk)
        assert restored[0][0, 2, 17, 5].item() == pytest.approx(500.0, abs=1.0)
        assert restored[1][0, 3, 63, 63].item() == pytest.approx(-700.0, abs=1.0)
        assert not same_bits(restored, (keys, values)), "it is still a lossy frame"
    assert encode(spec, (keys, values), HIGH[0]).size_bytes < plain.size_bytes


@pytest.mark.parametrize("encoding", HIGH, ids=operator.attrgetter("name"))
@pytest.mark.parametrize(
    ("dtype", "fill"),
    [
        (KVDtype.BFLOAT16, 0.0),
        (KVDtype.BFLOAT16, 3.0),
        (KVDtype.FLOAT16, 65504.0),
        (KVDtype.FLOAT32, 3e38),
        (KVDtype.FLOAT32, 1e-40),
    ],
)
def test_kv_without_variation_comes_back_exactly(encoding: Encoding, dtype: KVDtype, fill: float) -> None:
    spec = make_spec(layers=2, dtype=dtype)
    shape = (2, spec.kv_heads, 64, spec.head_dim)
    kv = torch.full(shape, fill, dtype=dtype.torch), torch.full(shape, -fill, dtype=dtype.torch)
    assert same_bits(decode(encode(spec, kv, encoding)), kv)


@pytest.mark.parametrize("scale", [1e-38, 1e-30, 1e-20, 1e19, 1e30, 1e38])
@pytest.mark.parametrize("dtype", [KVDtype.BFLOAT16, KVDtype.FLOAT32])
def test_high_neither_overflows_nor_vanishes_at_any_scale(dtype: KVDtype, scale: float) -> None:
    spec = make_spec(layers=1, dtype=dtype)
    keys, values = make_kv(spec, 64)
    kv = (keys.double() / 20 * scale).to(dtype.torch), (values.double() / 20 * scale).to(dtype.torch)
    for original, restored in zip(kv, decode(encode(spec, kv, HIGH[0])), strict=True):
        assert restored.isfinite().all()
        error = (original.double() - restored.double()).square().mean().sqrt()
        residual = original.double() - original.double().mean(2, keepdim=True)
        assert error <= 0.1 * residual.square().mean().sqrt()


@pytest.mark.parametrize("outlier", [100.0, 1e3, 1e4, 1e5])
def test_one_outlier_costs_its_layer_nothing(outlier: float) -> None:
    spec = make_spec(layers=2, kv_heads=2, head_dim=64, dtype=KVDtype.FLOAT32)
    keys, values = make_kv(spec, 64)
    keys[0, 0, 3, 3] = outlier
    restored = decode(encode(spec, (keys, values), HIGH[0]))
    error = (restored[0] - keys).square().mean().sqrt()
    assert error < 0.1
    assert restored[0][0, 0, 3, 3].item() == pytest.approx(outlier, rel=1e-3)


def test_high_never_rounds_up_to_infinity() -> None:
    spec = make_spec(layers=1, dtype=KVDtype.FLOAT16)
    generator = torch.Generator().manual_seed(0)
    shape = (2, 1, spec.kv_heads, 64, spec.head_dim)
    kv = (65504 * (2 * torch.rand(shape, generator=generator) - 1)).clamp(-65504, 65504).half()
    kv[..., 0] = 65504
    restored = decode(encode(spec, (kv[0], kv[1]), HIGH[0]))
    assert restored[0].isfinite().all()
    assert restored[1].isfinite().all()


def test_a_huge_channel_that_hardly_varies_is_not_damaged() -> None:
    spec = make_spec(layers=1, dtype=KVDtype.FLOAT32)
    keys, values = make_kv(spec, 64)
    keys[..., 7] = keys[..., 7] * 1e-3 + 1e6
    restored = decode(encode(spec, (keys, values), HIGH[0]))
    assert ((restored[0] - keys).abs() <= 0.5).all()


@pytest.mark.parametrize("encoding", ALL_ENCODINGS, ids=operator.attrgetter("name"))
def test_tensors_of_any_stride_are_taken_and_filled(encoding: Encoding) -> None:
    spec = make_spec(layers=5, kv_heads=3, head_dim=32)
    kv = make_kv(spec, 100)
    wanted = decode(encode(spec, kv, encoding))
    turned = [tensor.permute(3, 2, 0, 1).contiguous().permute(2, 3, 1, 0) for tensor in kv]
    assert not turned[0].is_contiguous()
    chunk = encode(spec, (turned[0], turned[1]), encoding)
    assert chunk.parts == encode(spec, kv, encoding).parts
    geometry = chunk.header.geometry
    for frame, data in enumerate(chunk.parts[1:]):
        layers, rows = frame_cuts(chunk)[frame]
        shape = geometry.frame_shape(frame)
        outs = [
            torch.zeros((*shape[::-1], 2), dtype=torch.bfloat16)[..., 0].permute(3, 2, 1, 0) for _ in range(2)
        ]
        decode_frames(chunk.header, frame, 1, data, *outs, **decoder_of(chunk.header))
        assert same_bits((outs[0], outs[1]), (wanted[0][layers, :, rows], wanted[1][layers, :, rows]))


def test_tensors_that_need_gradients_are_taken() -> None:
    spec = make_spec(layers=1)
    kv = make_kv(spec, 3)
    chunk = encode(spec, (kv[0].clone().requires_grad_(), kv[1].clone().requires_grad_()), EXACT[0])
    assert same_bits(decode(chunk), kv)


@pytest.mark.parametrize("encoding", ALL_ENCODINGS, ids=operator.attrgetter("name"))
def test_frames_decode_in_many_threads_at_once(encoding: Encoding) -> None:
    spec = make_spec(layers=8, kv_heads=2, head_dim=64)
    chunk = encode(spec, make_kv(spec, 256), encoding)
    wanted = decode(chunk)
    results: list[KV] = []
    threads = [threading.Thread(target=lambda: results.append(decode(chunk))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4
    assert all(same_bits(result, wanted) for result in results)


def test_encoding_twice_gives_the_same_bytes() -> None:
    spec = make_spec()
    kv = make_kv(spec, 256)
    for encoding in ALL_ENCODINGS:
        assert encode(spec, kv, encoding).parts == encode(spec, kv, encoding).parts


def test_tensors_that_do_not_fit_the_spec_are_refused() -> None:
    spec = make_spec(layers=2)
    keys, values = make_kv(spec, 8)
    for bad in (
        (keys.half(), values),
        (keys, values.float()),
        (keys[:1], values[:1]),
        (keys, values[:, :, :7]),
        (keys[:, :, :0], values[:, :, :0]),
        (keys[0], values[0]),
        (torch.tensor(1.0), torch.tensor(1.0)),
    ):
        with pytest.raises(InvalidKVError):
            encode(spec, bad, EXACT[0])


def test_decode_frame_refuses_what_does_not_fit() -> None:
    spec = make_spec(layers=2)
    chunk = encode(spec, make_kv(spec, 8), EXACT[0])
    header, data = chunk.header, chunk.parts[1]
    out = torch.zeros(header.geometry.frame_shape(0), dtype=torch.bfloat16)
    decode_frames(header, 0, 1, data, out, out.clone())
    for frame in (-1, 1):
        with pytest.raises(ChunkFormatError, match="does not have 1 frames"):
            decode_frames(header, frame, 1, data, out, out.clone())
    for bad in (out[:1], out.half(), out[..., :1], out.to("meta")):
        with pytest.raises(InvalidKVError):
            decode_frames(header, 0, 1, data, out, bad)
    with pytest.raises(ChecksumError):
        decode_frames(header, 0, 1, data[:-1] + bytes([data[-1] ^ 128]), out, out.clone())
    with pytest.raises(TruncatedChunkError):
        decode_frames(header, 0, 1, data[:-1], out, out.clone())
    for encoding in ALL_ENCODINGS:
        empty = dataclasses.replace(
            header, encoding=encoding, frame_lengths=(0,), frame_checksums=(xxhash.xxh3_64_intdigest(b""),)
        )
        with pytest.raises(CodecError) as caught:
            decode_frames(empty, 0, 1, b"", out, out.clone())
        assert encoding.name in caught.value.__notes__[0]


def test_decoding_a_slice_reads_frames_from_views_without_copies() -> None:
    spec = make_spec(layers=4)
    kv = make_kv(spec, 64)
    chunk = encode(spec, kv, EXACT[1])
    whole = memoryview(b"".join(chunk.parts))
    offset, length = chunk.header.range_bytes(0, 1)
    outs = [torch.zeros_like(tensor) for tensor in kv]
    decode_frames(chunk.header, 0, 1, whole[offset : offset + length], *outs)
    decode_frames(chunk.header, 0, 1, np.frombuffer(whole, np.uint8)[offset : offset + length], *outs)
    assert torch.equal(bits(outs[0]), bits(kv[0]))
