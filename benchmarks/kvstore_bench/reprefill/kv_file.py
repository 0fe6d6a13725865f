"""A prefix's KV in a file, layer by layer, as systems store it that read layer by layer from a local disk."""

from __future__ import annotations

import mmap
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch

from kvstore_cluster.pacer import Limit

_ALIGNED = 4096


@dataclass(frozen=True, slots=True)
class KVShape:
    layers: int
    kv_heads: int
    tokens: int
    head_dim: int
    dtype: torch.dtype

    @property
    def token_bytes(self) -> int:
        """Keys and values of one token of one layer."""
        return 2 * self.kv_heads * self.head_dim * self.dtype.itemsize


class KVFile:
    """Keys (rotated) and values of a prefix. The unit of a read is a chunk: `chunk_tokens` tokens of one layer; a read
    of neighbouring chunks is one. The keys of the first `probes` KV heads of each layer are stored apart, so that they
    can be read alone, and are not in the chunks. Reads bypass the page cache where the file system allows it, and take
    at least as long as the disk's rate allows. Thread-safe."""

    def __init__(
        self,
        path: Path,
        shape: KVShape,
        chunk_tokens: int,
        probes: int,
        rate_Bps: float | None,  # noqa: N803
    ) -> None:
        self.shape, self.chunk_tokens, self.probes = shape, chunk_tokens, probes
        head_bytes = shape.head_dim * shape.dtype.itemsize
        self._chunk_shape = 2 * shape.kv_heads - probes, chunk_tokens, shape.head_dim
        self._chunk_data_bytes = self._chunk_shape[0] * chunk_tokens * head_bytes
        self.chunk_bytes = _padded(self._chunk_data_bytes)
        self.probe_bytes = _padded(probes * shape.tokens * head_bytes)
        self.chunks = shape.tokens // chunk_tokens
        self._layer_bytes = self.probe_bytes + self.chunks * self.chunk_bytes
        self._limit = None if rate_Bps is None else Limit(rate_Bps)
        self._path = path
        self._descriptor = -1
        self._lock = threading.Lock()
        self._own = threading.local()
        self.bytes_read = 0

    def write(self, keys: Sequence[torch.Tensor], values: Sequence[torch.Tensor]) -> None:
        """Write keys and values by layer, `[kv_heads, tokens, head_dim]`, in the order that chunks hold tokens."""
        with self._path.open("wb") as file:
            for layer, (k, v) in enumerate(zip(keys, values, strict=True)):
                file.seek(layer * self._layer_bytes)
                file.write(_bytes(k[: self.probes]))
                for chunk in range(self.chunks):
                    file.seek(layer * self._layer_bytes + self.probe_bytes + chunk * self.chunk_bytes)
                    place = slice(chunk * self.chunk_tokens, (chunk + 1) * self.chunk_tokens)
                    file.write(_bytes(torch.cat((k[self.probes :, place], v[:, place]))))
            file.truncate(self.shape.layers * self._layer_bytes)
            file.flush()
            os.fsync(file.fileno())
        try:
            self._descriptor = os.open(self._path, os.O_RDONLY | os.O_DIRECT)
        except OSError:
            self._descriptor = os.open(self._path, os.O_RDONLY)

    def read_probes(self, layer: int) -> torch.Tensor:
        """Keys of the probe heads, `[probes, tokens, head_dim]`."""
        shape = self.shape
        data = self._read(layer * self._layer_bytes, self.probe_bytes)
        size = self.probes * shape.tokens * shape.head_dim
        return data.view(shape.dtype)[:size].view(-1, shape.tokens, shape.head_dim).clone()

    def read_chunks(self, layer: int, chunks: Sequence[int]) -> dict[int, torch.Tensor]:
        """Chunks, ascending, by number: keys of the heads that are no probes, and behind them values of all heads,
        `[2 * kv_heads - probes, chunk_tokens, head_dim]`."""
        found: dict[int, torch.Tensor] = {}
        borders = [0, *(i for i in range(1, len(chunks)) if chunks[i] != chunks[i - 1] + 1), len(chunks)]
        for begin, end in pairwise(borders):
            run = chunks[begin:end]
            if not run:
                continue
            offset = layer * self._layer_bytes + self.probe_bytes + run[0] * self.chunk_bytes
            data = self._read(offset, len(run) * self.chunk_bytes)
            for number, chunk in enumerate(run):
                part = data[number * self.chunk_bytes :][: self._chunk_data_bytes]
                found[chunk] = part.view(self.shape.dtype).view(self._chunk_shape).clone()
        return found

    def close(self) -> None:
        os.close(self._descriptor)

    def _read(self, offset: int, size: int) -> torch.Tensor:
        """Bytes of the file, in memory that the thread's next read overwrites: fresh memory costs more than a copy."""
        ready_at_s = None if self._limit is None else self._limit.reserve(size)
        memory = self._memory()[:size]
        received = os.preadv(self._descriptor, [memory], offset)
        if received != size:
            raise OSError(f"{received} of {size} bytes read at {offset}")
        if self._limit is not None and ready_at_s is not None:
            self._limit.wait_until(ready_at_s)
        with self._lock:
            self.bytes_read += size
        return torch.frombuffer(memory, dtype=torch.uint8)

    def _memory(self) -> memoryview:
        """Memory of this thread for any read, aligned as O_DIRECT needs it."""
        if not hasattr(self._own, "memory"):
            self._own.memory = memoryview(
                mmap.mmap(-1, max(self.probe_bytes, self.chunks * self.chunk_bytes))
            )
        memory: memoryview = self._own.memory
        return memory


def _padded(size: int) -> int:
    return -(-size // _ALIGNED) * _ALIGNED


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()
