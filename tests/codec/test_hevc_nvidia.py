"""NVIDIA's video engines. Without a GPU these tests are skipped, saying why; that a machine without one says so too
is tested there."""

from __future__ import annotations

import numpy as np
import pytest

from kvstore_codec.coders import availability, coder
from kvstore_codec.coders.hevc.base import HevcCoder, Prediction
from kvstore_codec.errors import ChunkFormatError, CoderUnavailableError

WHY_NO_NVDEC, WHY_NO_NVENC = availability("hevc-nvdec"), availability("hevc-nvenc")
needs_nvdec = pytest.mark.skipif(WHY_NO_NVDEC is not None, reason=str(WHY_NO_NVDEC))
needs_nvenc = pytest.mark.skipif(WHY_NO_NVENC is not None, reason=str(WHY_NO_NVENC))
RNG = np.random.default_rng(3)
SHAPES = [(1, 1, 144, 400), (5, 1, 144, 144), (1, 3, 144, 144), (6, 3, 240, 426)]


def hevc(name: str) -> HevcCoder:
    found = coder(name)
    assert isinstance(found, HevcCoder)
    return found


@pytest.mark.skipif(WHY_NO_NVDEC is None, reason="this machine has NVDEC")
@pytest.mark.parametrize("name", ["hevc-nvdec", "hevc-nvenc"])
def test_a_machine_without_the_engines_says_why(name: str) -> None:
    with pytest.raises(CoderUnavailableError, match=r"kvstore-service\[nvidia\]|cannot run here"):
        coder(name)


@needs_nvdec
@pytest.mark.parametrize("prediction", Prediction)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_nvdec_gives_the_integers_that_the_cpu_encoded(
    shape: tuple[int, int, int, int], prediction: Prediction
) -> None:
    pictures = RNG.integers(0, 256, shape, np.uint8)
    data = hevc("hevc-cpu-420").encode_pictures(pictures, prediction)
    out = np.zeros_like(pictures)
    for _ in range(2):  # a session is used again
        hevc("hevc-nvdec").decode_pictures(data, out)
        assert np.array_equal(out, pictures)


@needs_nvdec
def test_nvdec_refuses_what_is_no_picture_and_works_on() -> None:
    plane = RNG.integers(0, 256, (64, 400), np.uint8)
    data = hevc("hevc-cpu-420").encode(plane)
    out = np.zeros_like(plane)
    for bad in (b"", data[:70], data + data):
        with pytest.raises(ChunkFormatError):
            hevc("hevc-nvdec").decode(bad, out)
    hevc("hevc-nvdec").decode(data, out)
    assert np.array_equal(out, plane)


@needs_nvenc
@pytest.mark.parametrize("prediction", Prediction)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_nvenc_loses_nothing_and_the_cpu_reads_it(
    shape: tuple[int, int, int, int], prediction: Prediction
) -> None:
    pictures = RNG.integers(0, 256, shape, np.uint8)
    data = hevc("hevc-nvenc").encode_pictures(pictures, prediction)
    for name in ("hevc-nvenc", "hevc-cpu"):
        out = np.zeros_like(pictures)
        hevc(name).decode_pictures(data, out)
        assert np.array_equal(out, pictures)
