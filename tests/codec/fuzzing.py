"""What tests with bytes that nobody meant share."""

from __future__ import annotations

import contextlib
import resource
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from kvstore_codec.errors import CodecError

RNG = np.random.default_rng(2024)
# Far below the gigabytes that the length fields of a mutant may ask for.
EXTRA_MEMORY_BYTES = 64 << 20
SLOWEST_MUTANT_S = 5.0


@contextlib.contextmanager
def bounded_memory() -> Iterator[None]:
    """An allocation that follows a false length fails with MemoryError, and the test with it."""
    in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (in_use + EXTRA_MEMORY_BYTES, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def refused_mutants(read: Callable[[bytearray], object], data: bytes, mutants: int) -> int:
    """How many of so many mutants of `data` are refused by `read`. What is not a CodecError, or is slow, fails."""
    refused = 0
    for _ in range(mutants):
        mutant = mutate(data)
        started = time.process_time()
        try:
            read(mutant)
        except CodecError:
            refused += 1
        assert time.process_time() - started < SLOWEST_MUTANT_S
    return refused


def mutate(data: bytes) -> bytearray:
    """One to four edits: flipped bits, other bytes, extreme integers, cuts, insertions, repeated stretches."""
    mutant = bytearray(data)
    for _ in range(RNG.integers(1, 5)):
        at = int(RNG.integers(0, max(1, len(mutant))))
        length = int(RNG.integers(1, 9))
        match RNG.integers(0, 7):
            case 0 if mutant:
                mutant[at] ^= 1 << int(RNG.integers(0, 8))
            case 1:
                mutant[at : at + length] = RNG.bytes(length)
            case 2:
                mutant[at : at + 4] = struct.pack("<I", int(RNG.choice([0, 1, 2**31, 2**32 - 1, len(data)])))
            case 3:
                del mutant[at : at + length]
            case 4:
                mutant[at:at] = RNG.bytes(length)
            case 5:
                del mutant[at:]
            case 6:
                mutant[at:at] = mutant[at : at + 64]
    return mutant
