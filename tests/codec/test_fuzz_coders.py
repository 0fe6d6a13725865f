"""Streams of the byte coders that nobody meant: an error or a plane of the size asked for, soon, in bounded memory.

Those of the video coders are in `test_fuzz_hevc`."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from kvstore_codec.coders import coder
from tests.codec.fuzzing import RNG, bounded_memory, refused_mutants

CODERS = ["raw", "zstd", "pco"]
# Planes as they are coded: coefficients by falling variance, noise, and what is nearly constant.
SPREAD = np.linspace(6, 0, 60)[:, None]
PLANES = {
    "coefficients": (128 + RNG.standard_normal((60, 24)) * SPREAD).round().astype(np.uint8),
    "noise": RNG.integers(0, 256, (40, 32), np.uint8),
    "nearly constant": (128 + (RNG.random((70, 64)) < 0.01)).astype(np.uint8),
}


def fuzz(name: str, plane: np.ndarray, mutants: int) -> None:
    data = coder(name).encode(plane)
    # The end of the buffer is not the decoder's to write.
    room = np.full((len(plane) + 4, plane.shape[1]), 77, np.uint8)
    out, beyond = room[: len(plane)], room[len(plane) :]
    refused = refused_mutants(lambda mutant: coder(name).decode(mutant, out), data, mutants)
    assert (beyond == 77).all()
    assert 0 < refused < mutants
    coder(name).decode(data, out)
    assert np.array_equal(out, plane), "a coder must work on after errors"


@pytest.fixture(autouse=True)
def warm_and_bounded() -> Iterator[None]:
    for name in CODERS:  # libraries and contexts are not what is measured
        plane = PLANES["coefficients"]
        data, out = coder(name).encode(plane), np.empty_like(plane)
        refused_mutants(lambda mutant, name=name, out=out: coder(name).decode(mutant, out), data, mutants=100)
    with bounded_memory():
        yield


@pytest.mark.parametrize("plane", PLANES.values(), ids=PLANES.keys())
@pytest.mark.parametrize("name", CODERS)
def test_mutated_streams(name: str, plane: np.ndarray) -> None:
    fuzz(name, plane, mutants=1_000)


@pytest.mark.slow
@pytest.mark.parametrize("plane", PLANES.values(), ids=PLANES.keys())
@pytest.mark.parametrize("name", CODERS)
def test_many_more_mutated_streams(name: str, plane: np.ndarray) -> None:
    fuzz(name, plane, mutants=10_000)
