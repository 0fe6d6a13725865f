"""What every way of coding KV gives to be judged by, ours or another's."""

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
    """One passage after coding. Times are one per chunk, or per what a peer times at once."""

    keys: torch.Tensor
    """before RoPE, [layers, kv_heads, tokens, head_dim]"""
    values: torch.Tensor
    stored_bytes: int
    """all that is stored"""
    timed_bytes: Sequence[int]
    """KV of the model's dtype that each time stands for"""
    encode_s: Sequence[float]
    decode_s: Sequence[float]
    """from bytes to integers"""
    restore_s: Sequence[float] = ()
    """from integers to KV in the caller's tensors; none where that is part of decoding"""
    payload_bytes: int | None = None
    """the entropy-coded part alone, where a peer stores tables beside it"""
    guarded: Mapping[str, int] = field(default_factory=dict)
    """frames that the fidelity guard coded finer or exactly"""


class Method(Protocol):
    @property
    def name(self) -> str: ...

    @property
    def labels(self) -> Mapping[str, str | int]:
        """{method, layout, coder, rate, frame_tokens} of a row"""
        ...

    def code(self, passages: Sequence[Passage]) -> Iterator[Coded]:
        """Encode and decode each, in order."""
        ...


@dataclass(frozen=True, slots=True)
class Speed:
    """MB (1e6 bytes) of KV a second: the median and the distance between its quartiles."""

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
    """PyTorch computes in the calling thread alone."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class Stopwatch:
    """Seconds spent inside some methods."""

    def __init__(self) -> None:
        self.elapsed_s = 0.0

    def lap_s(self) -> float:
        """Since the last lap."""
        elapsed_s, self.elapsed_s = self.elapsed_s, 0.0
        return elapsed_s

    @contextmanager
    def watching(self, owner: object, *methods: str) -> Iterator[None]:
        """Time these methods of one object, which must not call each other, wherever they are called from."""
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
