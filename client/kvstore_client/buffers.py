"""Where fetched KV lands: memory that was touched before.

The first write to fresh pages runs at 1-2 GB/s, slower than a fast link and slower than decoding; warm memory takes
25 GB/s. So buffers are kept and used again.
"""

import threading
from dataclasses import dataclass

import torch

from kvstore_client.threads import single_threaded
from kvstore_codec.model_spec import ModelSpec


@dataclass(frozen=True, slots=True)
class KVBuffers:
    """`[layers, kv_heads, tokens, head_dim]` each. Values are decoded straight into place; keys are decoded into
    place and rotated there."""

    keys: torch.Tensor
    values: torch.Tensor
    memory: torch.Tensor
    """The flat bytes that both lie in."""


class BufferPool:
    """Keeps up to `limit_bytes` of memory for KVBuffers. Thread-safe."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._lock = threading.Lock()
        self._free: list[torch.Tensor] = []

    @single_threaded()  # a team of threads that exists here would hang the first one that a forked child makes
    def reserve(self, size_bytes: int) -> None:
        """Have that much memory ready, or what the pool may keep at most, touched ahead of time."""
        size_bytes = min(size_bytes, self._limit_bytes)
        memory = self._smallest(size_bytes)
        self._keep(torch.zeros(size_bytes, dtype=torch.uint8, device="cpu") if memory is None else memory)

    def take(self, spec: ModelSpec, tokens: int) -> KVBuffers:
        """Buffers for `tokens` tokens: the smallest free memory that holds them, or new memory."""
        shape = (spec.layers, spec.kv_heads, tokens, spec.head_dim)
        half_bytes = tokens * spec.kv_bytes_per_token // 2
        memory = self._smallest(2 * half_bytes)
        if memory is None:
            memory = torch.empty(2 * half_bytes, dtype=torch.uint8, device="cpu")
        keys, values = (
            memory[begin : begin + half_bytes].view(spec.dtype.torch).view(shape) for begin in (0, half_bytes)
        )
        return KVBuffers(keys, values, memory)

    def give_back(self, buffers: KVBuffers) -> None:
        """The caller no longer reads or writes these buffers."""
        self._keep(buffers.memory)

    def _smallest(self, size_bytes: int) -> torch.Tensor | None:
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
