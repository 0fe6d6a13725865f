"""HEVC streams nobody meant, in every chroma format: an error or pictures of the size asked for, soon, in bounded
memory."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from kvstore_codec.coders import coder
from kvstore_codec.coders.hevc.base import HevcCoder, Prediction
from tests.codec.fuzzing import RNG, bounded_memory, refused_mutants

# Coder, shape [pictures, planes, height, width], prediction, mutants of the quick run.
STREAMS = {
    "gray": ("hevc-cpu", (1, 1, 144, 144), Prediction.INTRA, 2_000),
    "4:2:0": ("hevc-cpu-420", (1, 1, 144, 144), Prediction.INTRA, 2_000),
    "4:4:4 intra": ("hevc-cpu", (2, 3, 144, 144), Prediction.INTRA, 1_000),
    "4:4:4 inter": ("hevc-cpu", (2, 3, 144, 144), Prediction.INTER, 1_000),
}


def fuzz(name: str, shape: tuple[int, int, int, int], prediction: Prediction, mutants: int) -> None:
    hevc = coder(name)
    assert isinstance(hevc, HevcCoder)
    # Sparse, as coefficients are: the time goes into reading samples, and few of them are enough to go wrong.
    pictures = (128 + RNG.integers(-2, 3, shape) * (RNG.random(shape) < 0.02)).astype(np.uint8)
    stream = hevc.encode_pictures(pictures, prediction)
    # The end of the buffer is not the decoder's to write.
    room = np.full((shape[0] + 1, *shape[1:]), 77, np.uint8)
    out, beyond = room[: shape[0]], room[shape[0] :]
    refused = refused_mutants(lambda mutant: hevc.decode_pictures(mutant, out), stream, mutants)
    assert (beyond == 77).all()
    assert 0 < refused < mutants
    hevc.decode_pictures(stream, out)
    assert np.array_equal(out, pictures), "a coder must work on after errors"


@pytest.fixture(autouse=True)
def warm_and_bounded() -> Iterator[None]:
    for name, shape, prediction, _ in STREAMS.values():  # libraries and contexts are not what is measured
        fuzz(name, shape, prediction, mutants=100)
    with bounded_memory():
        yield


@pytest.mark.parametrize("stream", STREAMS)
def test_mutated_streams(stream: str) -> None:
    name, shape, prediction, mutants = STREAMS[stream]
    fuzz(name, shape, prediction, mutants)


@pytest.mark.slow
@pytest.mark.parametrize("stream", STREAMS)
def test_many_more_mutated_streams(stream: str) -> None:
    name, shape, prediction, _ = STREAMS[stream]
    fuzz(name, shape, prediction, mutants=10_000)
