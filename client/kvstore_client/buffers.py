"""Pool of host memory for fetched KV.

The first write to fresh pages runs at 1-2 GB/s, slower than a fast link and slower than decoding; warm memory takes 25
GB/s. With a CUDA device the memory is page-locked, because a copy from pageable memory blocks its caller.
"""

import logging
import threading
from dataclasses import dataclass, field
from typing import Protocol

import torch

from kvstore_client.threads import single_threaded
from kvstore_codec.model_spec import ModelSpec

log = logging.getLogger(__name__)


class Copy(Protocol):
    """An asynchronous copy to a device, such as a `torch.cuda.Event` recorded behind the copy."""

    def query(self) -> bool:
        """Whether the copy has ended. Does not block."""


@dataclass(frozen=True, slots=True)
class KVBuffers:
    """Keys and values, `[layers, kv_heads, tokens, head_dim]` each. The contiguous `Destination` of a fetch: values are
    decoded in place; keys are decoded and rotated in place."""

    keys: torch.Tensor
    values: torch.Tensor
    memory: torch.Tensor
    """Flat bytes that hold both tensors."""
    windows: tuple[int | None, ...] = ()
    """Sliding window of each layer, tokens (None: full attention); empty if no layer has one. In a layer with a window,
    memory further back than the `window - 1` tokens before the first computed one may never have been written."""
    copies: list[Copy] = field(default_factory=list, compare=False)
    """Copies to a device that may still read the memory after the buffers are released."""

    @property
    def layers(self) -> int:
        return self.keys.shape[0]

    def prepare(self, layers: slice, tokens: slice) -> tuple[torch.Tensor, torch.Tensor]:
        return self.keys[layers, :, tokens], self.values[layers, :, tokens]

    def complete(self, layers: slice, tokens: slice, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Nothing to do: the range is in its place already."""


class BufferPool:
    """Keeps up to `limit_bytes` of memory for KVBuffers. Thread-safe."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._lock = threading.Lock()
        self._free: list[torch.Tensor] = []
        self._being_copied: list[KVBuffers] = []

    @single_threaded()  # a thread team created here would hang the first one that a forked child creates
    def reserve(self, size_bytes: int) -> None:
        """Allocate and touch this much memory in advance, up to the pool's limit."""
        size_bytes = min(size_bytes, self._limit_bytes)
        memory = self._smallest(size_bytes)
        self._keep(_host_memory(size_bytes).zero_() if memory is None else memory)

    def acquire(self, spec: ModelSpec, tokens: int) -> KVBuffers:
        """Buffers for `tokens` tokens, in the smallest free memory that fits, or in new memory."""
        shape = (spec.layers, spec.kv_heads, tokens, spec.head_dim)
        half_bytes = tokens * spec.kv_bytes_per_token // 2
        memory = self._smallest(2 * half_bytes)
        if memory is None:
            memory = _host_memory(2 * half_bytes)
        keys, values = (
            memory[begin : begin + half_bytes].view(spec.dtype.torch).view(shape) for begin in (0, half_bytes)
        )
        return KVBuffers(keys, values, memory, spec.sliding_windows)

    def release(self, buffers: KVBuffers) -> None:
        """Return buffers that the caller no longer reads or writes. They are reused when their copies have ended."""
        with self._lock:
            self._being_copied.append(buffers)
        self._keep_copied()

    def _keep_copied(self) -> None:
        """Keep memory whose copies have ended. Memory that a copy still reads does not count towards the limit; there
        is no more of it than the requests in flight have acquired."""
        with self._lock:
            copied = [b for b in self._being_copied if all(copy.query() for copy in b.copies)]
            self._being_copied = [b for b in self._being_copied if all(b is not other for other in copied)]
        for buffers in copied:
            self._keep(buffers.memory)

    def _smallest(self, size_bytes: int) -> torch.Tensor | None:
        self._keep_copied()
        with self._lock:
            fitting = [m for m in self._free if m.numel() >= size_bytes]
            if not fitting:
                return None
            best = min(fitting, key=torch.Tensor.numel)
            self._free = [m for m in self._free if m is not best]
            return best

    def _keep(self, memory: torch.Tensor) -> None:
        """Keep the largest pieces that fit the limit together."""
        with self._lock:
            kept: list[torch.Tensor] = []
            total_bytes = 0
            for piece in sorted((*self._free, memory), key=torch.Tensor.numel, reverse=True):
                if total_bytes + piece.numel() <= self._limit_bytes:
                    kept.append(piece)
                    total_bytes += piece.numel()
            self._free = kept


def _host_memory(size_bytes: int) -> torch.Tensor:
    """Untouched memory; page-locked where there is a CUDA device and memory left to lock."""
    if torch.cuda.is_available():
        try:
            return torch.empty(size_bytes, dtype=torch.uint8, device="cpu", pin_memory=True)
        except RuntimeError as error:  # also in a forked child, which cannot use the parent's device
            log.info("KV is fetched into pageable memory: %s", error)
    return torch.empty(size_bytes, dtype=torch.uint8, device="cpu")
