from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from kvstore_codec.codec import chunk_geometry
from kvstore_codec.encoding import Encoding, Rate
from kvstore_codec.errors import ChunkFormatError, UnknownEncodingError
from kvstore_codec.geometry import MAX_FRAMES, Geometry, period_layers_of
from kvstore_codec.model_spec import KVDtype
from tests.codec.chunks import make_spec


@settings(deadline=None)
@given(
    layers=st.integers(1, 40),
    tokens=st.integers(1, 400),
    frame_tokens=st.integers(1, 128),
    period_layers=st.integers(1, 9),
)
def test_frames_tile_the_chunk_period_by_period(
    layers: int, tokens: int, frame_tokens: int, period_layers: int
) -> None:
    assume(-(-layers // period_layers) * -(-tokens // frame_tokens) <= MAX_FRAMES)
    geometry = Geometry(layers, 2, 8, KVDtype.FLOAT16, tokens, frame_tokens, period_layers)
    cells = []
    for frame in range(geometry.frame_count):
        period, slot = divmod(frame, geometry.frames_per_period)
        frame_layers, frame_rows = geometry.layers_of(period), geometry.tokens_of(slot)
        assert geometry.frame_shape(frame) == (len(frame_layers), 2, len(frame_rows), 8)
        assert geometry.frame_values(frame) == 2 * len(frame_layers) * 2 * len(frame_rows) * 8
        assert max(len(frame_layers) / period_layers, len(frame_rows) / frame_tokens) <= 1
        cells += [(layer, token) for layer in frame_layers for token in frame_rows]
    assert len(cells) == len(set(cells)) == layers * tokens
    assert [layer for layer, _ in cells[:: max(1, tokens * period_layers)]] == list(
        range(0, layers, period_layers)
    )


def test_a_default_chunk() -> None:
    geometry = Geometry.of(make_spec(layers=30, kv_heads=3, head_dim=64))
    assert (geometry.tokens, geometry.periods, geometry.frames_per_period) == (256, 8, 4)
    assert geometry.frame_shape(0) == (4, 3, 64, 64)
    assert geometry.frame_shape(31) == (2, 3, 64, 64)


@pytest.mark.parametrize(
    ("windows", "period_layers"),
    [
        ((), 4),
        ((512,) * 9, 4),
        ((*[512] * 5, None) * 2, 1),
        ((512, 512, None, None) * 2, 2),
        ((None,) * 4 + (512,) * 5, 4),
        ((None,) * 3 + (512,) * 5, 3),
        ((512, None) * 3, 1),
        ((512,), 4),
        ((512, 512, 1024, 1024), 2),
    ],
)
def test_no_period_mixes_windows(windows: tuple[int | None, ...], period_layers: int) -> None:
    spec = replace(make_spec(layers=len(windows) or 9), sliding_windows=windows)
    assert period_layers_of(spec) == period_layers
    geometry = chunk_geometry(spec, 256, Encoding.parse("exact-zstd"))
    for period in range(geometry.periods):
        assert len({windows[layer] for layer in geometry.layers_of(period) if windows}) <= 1


@pytest.mark.parametrize(
    ("encoding", "windows", "period_layers"),
    [
        ("exact-zstd@16x2", (None,) * 9, 2),
        ("exact-raw@64x8", (None,) * 9, 8),
        ("high-zstd@64x1", (None,) * 9, 1),
        ("exact-zstd@16x2", (*[512] * 5, None) * 2, 1),
        ("exact-zstd@16x6", ((None,) * 3 + (512,) * 6), 3),
    ],
)
def test_an_encoding_may_say_how_many_layers_a_period_has(
    encoding: str, windows: tuple[int | None, ...], period_layers: int
) -> None:
    """As far as no period mixes windows."""
    spec = replace(make_spec(layers=len(windows)), sliding_windows=windows)
    geometry = chunk_geometry(spec, 256, Encoding.parse(encoding))
    assert geometry.period_layers == period_layers


@pytest.mark.parametrize(
    "dimensions",
    [
        (0, 1, 1, 1, 1, 1),
        (1, -1, 1, 1, 1, 1),
        (1, 1, 2**40, 1, 1, 1),
        (1, 1, 1, 2**31, 1, 1),
        (1, 1, 1, 1, 0, 1),
        (1, 1, 1, 1, 1, 10**6),
        (1, 1, "64", 1, 1, 1),
        (1, 1, 64.0, 1, 1, 1),
        (1024, 1, 1, 65536, 1, 1),  # frames
        (1024, 1024, 4096, 65536, 65536, 1024),  # values in a frame
    ],
)
def test_absurd_dimensions_are_refused(dimensions: tuple[int, int, int, int, int, int]) -> None:
    layers, heads, dim, tokens, frame_tokens, period_layers = dimensions
    with pytest.raises(ChunkFormatError, match="absurd"):
        Geometry(layers, heads, dim, KVDtype.FLOAT32, tokens, frame_tokens, period_layers)


def test_encoding_names_are_read_back() -> None:
    assert Encoding(Rate.HIGH, "hevc-cpu").name == "high-hevc-cpu"
    assert {"exact-zstd", "high-zstd", "high-hevc-cpu"} <= set(Encoding.names())
    for name in [
        *Encoding.names(),
        "step0.3-zstd",
        "step1e-05-klt-pco",
        "medium-klt-hevc-cpu@256",
        "exact-zstd@16x2",
    ]:
        assert Encoding.parse(name).name == name
    assert Encoding(2, "raw").name == "step2.0-raw"
    assert Encoding.parse("step0.3-zstd@128") == Encoding(0.3, "zstd", frame_tokens=128)
    assert Encoding.parse("high-zstd@64x1") == Encoding(Rate.HIGH, "zstd", period_layers=1)


@pytest.mark.parametrize(
    "name",
    [
        *("", "exact", "exact-", "exact-hevc-cpu", "exact-klt-zstd", "low-pco", "zstd-exact", "HIGH-zstd"),
        *("high-zstd@64", "high-zstd@0", "high-zstd@9999999"),
        *(
            "exact-zstdx2",
            "exact-zstd@x2",
            "exact-zstd@16x0",
            "exact-zstd@16x02",
            "exact-zstd@16x2x2",
            "exact-zstd@16x1025",
        ),
        *("high-hevc-cpu@64x3", "medium-klt-pco@16x2"),
        *("step-zstd", "step0-zstd", "step-1.0-zstd", "stepinf-zstd", "step0.50-zstd", "step1e-40-zstd"),
        *("exact-zstd@" + "1" * 5000, "step" + "e-" * 50_000 + "!", "step1" + "-a" * 50_000),
    ],
)
def test_unknown_encodings_are_refused_with_the_known_ones(name: str) -> None:
    with pytest.raises(UnknownEncodingError, match=r"known are exact-zstd, .*high-hevc-cpu"):
        Encoding.parse(name)


def test_kv_is_stored_only_behind_what_was_as_faithful() -> None:
    def may(name: str, behind: str) -> bool:
        return Encoding.parse(name).may_follow(Encoding.parse(behind))

    assert may("exact-zstd", "exact-raw")
    assert may("medium-klt-pco", "exact-zstd")
    assert may("medium-klt-pco", "high-zstd")
    assert may("medium-klt-pco", "medium-klt-hevc-cpu@256")
    assert not may("exact-zstd", "high-zstd")
    assert not may("high-klt-pco", "medium-klt-pco")
    assert may("step0.1-klt-pco", "step0.1-klt-zstd")
    assert not may("step0.1-klt-pco", "high-klt-pco")
    assert not may("low-klt-pco", "step0.1-klt-pco")
