from __future__ import annotations

import subprocess
import sys
import threading

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore_codec.coders import availability, coder
from kvstore_codec.errors import ChunkFormatError, CoderUnavailableError, UnknownEncodingError

NAMES = ["raw", "zstd", "pco", "hevc-cpu", "hevc-cpu-420"]
RNG = np.random.default_rng(0)
EVERY_BYTE = np.arange(256, dtype=np.uint8)
PLANES = {
    "every value": EVERY_BYTE.repeat(64).reshape(-1, 64),
    "every pair": np.stack(np.meshgrid(EVERY_BYTE, EVERY_BYTE)).reshape(-1, 128),
    "noise": RNG.integers(0, 256, (192, 256), np.uint8),
    "gaussian": (RNG.standard_normal((1536, 64)) * 5 + 128).clip(0, 255).astype(np.uint8),
    "zeros": np.zeros((200, 160), np.uint8),
    "all 255": np.full((300, 80), 255, np.uint8),
    "one sample": np.array([[77]], np.uint8),
    "one row": RNG.integers(0, 256, (1, 999), np.uint8),
    "one column": RNG.integers(0, 256, (999, 1), np.uint8),
    "odd sides": RNG.integers(0, 256, (301, 33), np.uint8),
}


def decode(name: str, data: bytes, shape: tuple[int, int]) -> np.ndarray:
    out = np.full(shape, 99, np.uint8)
    coder(name).decode(data, out)
    return out


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("plane", PLANES.values(), ids=PLANES.keys())
def test_planes_come_back_bit_for_bit(name: str, plane: np.ndarray) -> None:
    data = coder(name).encode(plane)
    assert np.array_equal(decode(name, data, plane.shape), plane)
    assert coder(name).encode(plane) == data, "what a coder writes must not depend on what it wrote before"


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 700), cols=st.integers(1, 300), seed=st.integers(0, 2**32), spread=st.integers(1, 256)
)
def test_any_shape_comes_back(name: str, rows: int, cols: int, seed: int, spread: int) -> None:
    plane = np.random.default_rng(seed).integers(0, spread, (rows, cols)).astype(np.uint8)
    assert np.array_equal(decode(name, coder(name).encode(plane), plane.shape), plane)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(192, 257), (190, 256), (256, 256), (1, 1), (1000, 1000)])
def test_another_shape_than_was_coded_is_refused(name: str, shape: tuple[int, int]) -> None:
    data = coder(name).encode(PLANES["noise"])
    with pytest.raises(ChunkFormatError):
        decode(name, data, shape)


@pytest.mark.parametrize("name", NAMES)
def test_cut_and_foreign_bytes_are_refused(name: str) -> None:
    plane = PLANES["gaussian"]
    data = coder(name).encode(plane)
    # A picture cut in its slice decodes to something: finding that is the frame checksum's job.
    cut = (data[:70],) if "hevc" in name else (data[:70], data[:-1], data[:-40], data[: len(data) // 2])
    for bad in (b"", b"\0", *cut, b"\xff" * 5000, b"\0\0\1" * 5000):
        with pytest.raises(ChunkFormatError):
            decode(name, bad, plane.shape)
    assert np.array_equal(decode(name, data, plane.shape), plane), "a coder must work on after an error"


@pytest.mark.parametrize("name", NAMES)
def test_one_coder_serves_many_threads(name: str) -> None:
    planes = [RNG.integers(0, 40, (200 + 7 * index, 64), np.uint8) for index in range(4)]
    same: list[bool] = []

    def work(index: int) -> None:
        mine = planes[index:] + planes[:index]
        same.extend(
            np.array_equal(decode(name, coder(name).encode(plane), plane.shape), plane) for plane in mine
        )

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert same == [True] * 16


def test_zstd_bombs_are_refused_before_they_are_decoded() -> None:
    bomb = zstandard.ZstdCompressor().compress(bytes(1 << 28))
    assert len(bomb) < 1 << 16
    with pytest.raises(ChunkFormatError, match="268435456"):
        decode("zstd", bomb, (64, 64))
    nameless = zstandard.ZstdCompressor(write_content_size=False).compress(bytes(4096))
    with pytest.raises(ChunkFormatError):
        decode("zstd", nameless, (64, 64))


def test_zstd_reaches_the_entropy_of_noise() -> None:
    plane = PLANES["gaussian"]
    shares = np.bincount(plane.ravel(), minlength=256) / plane.size
    shares = shares[shares > 0]
    entropy_bytes = -(shares * np.log2(shares)).sum() * plane.size / 8
    assert len(coder("zstd").encode(plane)) < 1.03 * entropy_bytes


def hevc_units(data: bytes) -> list[bytes]:
    return [b"\0\0\1" + unit.rstrip(b"\0") for unit in data.split(b"\0\0\1")[1:]]


def test_an_hevc_frame_is_parameter_sets_and_one_picture() -> None:
    units = hevc_units(coder("hevc-cpu").encode(PLANES["gaussian"]))
    assert [unit[3] >> 1 for unit in units] in ([32, 33, 34, 19], [32, 33, 34, 20])
    assert sum(map(len, units[:3])) < 120


def test_hevc_streams_of_another_kind_are_refused() -> None:
    plane = PLANES["gaussian"]
    vps, sps, pps, picture = hevc_units(coder("hevc-cpu").encode(plane))
    larger = hevc_units(coder("hevc-cpu").encode(np.zeros((4096, 1024), np.uint8)))
    aud = b"\0\0\1\x46\1\x10"
    for reason, stream in {
        "2 pictures": [vps, sps, pps, picture, picture],
        "0 pictures": [vps, sps, pps],
        "unit 1 is of kind 34": [vps, pps, picture],
        "unit 2 is of kind 33": [vps, sps, larger[1], pps, picture],
        "picture of .* is not one of": [vps, larger[1], pps, picture],
        "unit 0 is of kind 35": [aud, vps, sps, pps, picture],
        "layer 1": [vps, sps[:3] + b"\x42\x09" + sps[5:], pps, picture],
    }.items():
        with pytest.raises(ChunkFormatError, match=reason):
            decode("hevc-cpu", b"".join(stream), plane.shape)
    joined = b"".join((vps, sps, pps, picture))
    assert np.array_equal(decode("hevc-cpu", joined, plane.shape), plane)


def test_coders_are_known_by_name() -> None:
    for name in NAMES:
        assert availability(name) is None
        assert coder(name) is coder(name)
    with pytest.raises(
        UnknownEncodingError, match=r"known are raw, zstd, .*hevc-cpu, hevc-cpu-420, hevc-nvdec"
    ):
        coder("h266")


def test_without_pyav_the_other_coders_work_and_hevc_says_why_not() -> None:
    code = (
        "import sys; sys.modules['av'] = None\n"
        "from kvstore_codec.coders import availability, coder\n"
        "from kvstore_codec.errors import CoderUnavailableError\n"
        "import kvstore_codec.codec\n"
        "assert availability('zstd') is None\n"
        "try: coder('hevc-cpu')\n"
        "except CoderUnavailableError as error: print(error == availability('hevc-cpu') or error)\n"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "hevc-cpu" in answer
    assert "import of av halted" in answer


def test_a_pyav_without_x265_is_named_as_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    from kvstore_codec.coders.hevc import cpu

    monkeypatch.setattr(cpu, "_ENCODER", "libx265-not-built-in")
    with pytest.raises(CoderUnavailableError, match="without libx265-not-built-in"):
        cpu.HevcCpuCoder()
