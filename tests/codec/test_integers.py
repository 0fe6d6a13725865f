"""Every layout with every coder gives back the integers that went in, bit for bit, whatever the model's shape."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore_codec.calibration import Calibration, PeriodTransform
from kvstore_codec.codec import EncodedChunk, decode_frames, encode_chunk
from kvstore_codec.encoding import Encoding
from kvstore_codec.klt_frames import KLT
from kvstore_codec.model_spec import KVDtype, ModelSpec
from kvstore_codec.payload import PayloadKind
from tests.codec.chunks import CHUNK_ID, decode, encode, make_kv, make_spec, same_bits

pytestmark = pytest.mark.usefixtures("one_thread")

KLT_CODERS = ["raw", "zstd", "pco", "hevc-cpu", "hevc-cpu-420"]
PLAIN_CODERS = ["raw", "zstd", "hevc-cpu"]
FRAME_TOKENS = ["", "@16", "@128", "@256"]
STEP = 0.5
# Fewer bytes of KV than this may be smaller as they are than with a coder's overhead.
SMALL_FRAME_BYTES = 1 << 15

layers, tokens = st.integers(1, 5), st.one_of(st.integers(1, 20), st.integers(1, 300))
heads = st.integers(1, 16)
dims = st.one_of(st.sampled_from([32, 64, 80, 96, 128, 256]), st.integers(16, 128).map(lambda half: 2 * half))


def channel_calibration(spec: ModelSpec, period_layers: int, columns: int) -> Calibration:
    """Its coefficients are `columns` channels of each period, taken from everywhere, as they are."""
    periods = []
    for first in range(0, spec.layers, period_layers):
        count = min(period_layers, spec.layers - first)
        size = count * 2 * spec.kv_heads * spec.head_dim
        chosen = torch.randperm(size, generator=torch.Generator().manual_seed(size))[:columns]
        basis = torch.zeros(size, len(chosen))
        basis[chosen, torch.arange(len(chosen))] = 1
        identity = torch.eye(spec.head_dim).expand(count, 2, spec.kv_heads, -1, -1).contiguous()
        nothing = torch.zeros(2, 0), torch.zeros(0, size)
        periods.append(PeriodTransform(torch.zeros(size), *nothing, identity, basis, torch.ones(len(chosen))))
    return Calibration(spec.digest, period_layers, 4, {}, {}, tuple(periods))


def whole_kv(spec: ModelSpec, calibration: Calibration, tokens: int, spread: int, seed: int) -> torch.Tensor:
    """Multiples of STEP from 8-bit integers in those channels, zeros elsewhere: `[2, layers, heads, tokens, dim]`."""
    generator, parts = torch.Generator().manual_seed(seed), []
    for period in calibration.periods:
        shape = tokens, period.basis.shape[1]
        integers = torch.randint(0, spread, shape, generator=generator) - spread // 2
        rows = STEP * integers.float() @ period.basis.T
        parts.append(rows.view(tokens, period.layers, 2, spec.kv_heads, spec.head_dim))
    return torch.cat(parts, 1).permute(2, 1, 3, 0, 4).contiguous()


@settings(max_examples=30, deadline=None)
@given(
    layers=layers,
    heads=heads,
    dim=dims,
    tokens=tokens,
    frame_tokens=st.sampled_from(FRAME_TOKENS),
    spread=st.sampled_from([1, 3, 40, 256]),
    columns=st.integers(1, 200),
    seed=st.integers(0, 2**32),
    sinks=st.sampled_from([0, 4]),
)
def test_klt_frames(
    layers: int,
    heads: int,
    dim: int,
    tokens: int,
    frame_tokens: str,
    spread: int,
    columns: int,
    seed: int,
    sinks: int,
) -> None:
    layers = min(layers, max(1, (1 << 11) // (heads * dim)))  # maps of this size are what takes time
    tokens = min(tokens, max(1, (1 << 19) // (2 * layers * heads * dim)))
    spec = make_spec(layers, heads, dim, KVDtype.FLOAT32)
    klt = KLT(channel_calibration(spec, 2, columns))
    kv, features = whole_kv(spec, klt.calibration, tokens, spread, seed), torch.zeros(tokens, 2)
    for coder in KLT_CODERS:
        chunk = encode_chunk(
            *kv,
            spec=spec,
            chunk_id=CHUNK_ID,
            encoding=Encoding.parse(f"step{STEP}-klt-{coder}{frame_tokens}"),
            klt=klt,
            features=features,
            sinks=sinks,
        )
        assert torch.equal(read(chunk, klt, features), kv)


def read(chunk: EncodedChunk, klt: KLT, features: torch.Tensor) -> torch.Tensor:
    """Whole periods at a time, `[2, layers, heads, tokens, dim]`. All but small frames must hold coefficients."""
    geometry, prediction = chunk.header.geometry, klt.predict(features)
    shape = 2, geometry.layers, geometry.kv_heads, geometry.tokens, geometry.head_dim
    out = torch.full(shape, math.nan)
    count = geometry.frames_per_period
    for period in range(geometry.periods):
        layers, first = geometry.layers_of(period), period * count
        frames, room = chunk.parts[1 + first : 1 + first + count], out[:, layers.start : layers.stop]
        for slot, frame in enumerate(frames):
            rows = geometry.tokens_of(slot)
            small = room[:, :, :, rows.start : rows.stop].nbytes < SMALL_FRAME_BYTES
            assert small or frame[0] == PayloadKind.KLT
        data = b"".join(frames)
        decode_frames(chunk.header, first, count, data, *room, klt=klt, prediction=prediction)
    return out


@settings(max_examples=25, deadline=None)
@given(
    layers=layers,
    heads=heads,
    dim=dims,
    tokens=tokens,
    frame_tokens=st.sampled_from(FRAME_TOKENS),
    step=st.sampled_from([0.02, 0.18, 3.0]),  # escapes; every 8-bit value; hardly any
    seed=st.integers(0, 2**32),
)
def test_token_frames(
    layers: int, heads: int, dim: int, tokens: int, frame_tokens: str, step: float, seed: int
) -> None:
    """The integers are those of the coder that stores them as they are. Video alone has periods of three layers, so
    up to three are compared."""
    layers = min(layers, 3)
    tokens = min(tokens, max(1, (1 << 18) // (2 * layers * heads * dim)))
    spec = make_spec(layers, heads, dim)
    kv = make_kv(spec, tokens, seed)
    chunks = [encode(spec, kv, Encoding.parse(f"step{step}-{coder}{frame_tokens}")) for coder in PLAIN_CODERS]
    plain, *others = [decode(chunk) for chunk in chunks]
    assert all(same_bits(plain, other) for other in others)
