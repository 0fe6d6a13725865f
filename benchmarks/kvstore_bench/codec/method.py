"""The interface of a measured way to encode KV, and helpers to time it."""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch

from kvstore_bench.codec.fidelity import Passage


@dataclass(frozen=True, slots=True)
class Coded:
    """One passage after encoding and decoding. There is one time per chunk, or per part that a peer times as one."""

    keys: torch.Tensor
    """before RoPE, [layers, kv_heads, tokens, head_dim]"""
    values: torch.Tensor
    stored_bytes: int
    """bytes of everything that is stored"""
    timed_bytes: Sequence[int]
    """bytes of KV in the model's dtype that each time is for"""
    encode_s: Sequence[float]
    decode_s: Sequence[float]
    """seconds from bytes to integers"""
    restore_s: Sequence[float] = ()
    """seconds from integers to KV in the caller's tensors; empty if that is part of decoding"""
    payload_bytes: int | None = None
    """bytes of the entropy-coded part only, for a peer that also stores tables"""
    guarded: Mapping[str, int] = field(default_factory=dict)
    """number of frames that the fidelity guard encoded with a finer step or exactly"""


class Method(Protocol):
    @property
    def name(self) -> str: ...

    @property
    def labels(self) -> Mapping[str, str | int]:
        """The fields {method, layout, coder, rate, frame_tokens} of the method's row."""
        ...

    def code(self, passages: Sequence[Passage]) -> Iterator[Coded]:
        """Encodes and decodes each passage, in order."""
        ...


@dataclass(frozen=True, slots=True)
class Speed:
    """Speed in MB (1e6 bytes) of KV per second: the median, and the interquartile range."""

    median: float
    iqr: float

    @classmethod
    def of(cls, timed_bytes: Iterable[int], times_s: Iterable[float]) -> "Speed | None":
        speeds = [size / time_s / 1e6 for size, time_s in zip(timed_bytes, times_s, strict=True)]
        if not speeds:
            return None
        low, median, high = np.percentile(speeds, (25, 50, 75))
        return cls(float(median), float(high - low))


@contextmanager
def one_thread() -> Iterator[None]:
    """Limits PyTorch to one thread during the block."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class Stopwatch:
    """Measures the seconds spent inside chosen methods."""

    def __init__(self) -> None:
        self.elapsed_s = 0.0

    def lap_s(self) -> float:
        """Seconds since the last call."""
        elapsed_s, self.elapsed_s = self.elapsed_s, 0.0
        return elapsed_s

    @contextmanager
    def watching(self, owner: object, *methods: str) -> Iterator[None]:
        """Times calls of these methods of one object during the block. The methods must not call each other."""
        for name in methods:
            setattr(owner, name, self._timed(getattr(owner, name)))
        try:
            yield
        finally:
            for name in methods:
                delattr(owner, name)

    def _timed(self, method: Callable[..., None]) -> Callable[..., None]:
        def call(*arguments: Any) -> None:
            begin = time.perf_counter()
            method(*arguments)
            self.elapsed_s += time.perf_counter() - begin

        return call
