"""Methods for the worker of a vLLM server, which look at the KV memory that the connector has registered.

vLLM adds them to its worker with `--worker-extension-cls`, as EXTENSION names it. `Completions.call_worker` calls them;
they may only be called while the engine has no request.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from blake3 import blake3

from kvstore_client.engines.vllm.memory import PagedMemory

EXTENSION = f"{__name__}.KVMemoryInspection"

_COPIED_TOKENS = 2048
_REPEATS = 5
_BLOCKS_AT_ONCE = 256


def digests(keys: torch.Tensor, values: torch.Tensor, block_tokens: int) -> list[str]:
    """Digests of KV in host memory, of each `block_tokens` tokens. Keys and values are
    `[layers, kv_heads, tokens, head_dim]` each."""
    found = []
    for first in range(0, keys.shape[2], block_tokens):
        tokens = slice(first, first + block_tokens)
        parts = (part[:, :, tokens].contiguous().view(torch.uint8).numpy() for part in (keys, values))
        found.append(blake3(b"".join(part.tobytes() for part in parts)).hexdigest())
    return found


class KVMemoryInspection:
    """Mixed into vLLM's worker. Its methods return what JSON can say."""

    def kvstore_layout(self) -> dict[str, Any]:
        """{layout, device, dtype, layers, block_tokens (of the scheduler), shape, strides}. The layout has passed the
        connector's check: an engine whose KV is read back wrongly does not start."""
        memory = _memory()
        tensor = memory.tensors[0]
        return {
            "layout": type(memory.layout).__name__,
            "device": tensor.device.type,
            "dtype": str(tensor.dtype).removeprefix("torch."),
            "layers": len(memory.tensors),
            "block_tokens": _block_tokens(memory),
            "shape": list(tensor.shape),
            "strides": list(tensor.stride()),
        }

    @torch.inference_mode()
    def kvstore_block_digests(self) -> list[str]:
        """A digest of each block's KV, of all layers."""
        memory = _memory()
        block_tokens = _block_tokens(memory)
        blocks = range(memory.blocks)
        found: list[str] = []
        for first in range(0, len(blocks), _BLOCKS_AT_ONCE):
            ids = blocks[first : first + _BLOCKS_AT_ONCE]
            layers = [_read(memory, layer, ids) for layer in range(len(memory.tensors))]
            keys, values = (torch.stack([layer[half].cpu() for layer in layers]) for half in (0, 1))
            found += digests(keys, values, block_tokens)
        return found

    @torch.inference_mode()
    def kvstore_copies(self) -> list[dict[str, Any]]:
        """Rows {direction, host_memory, MB, GBps, identical}: KV of some blocks is copied to the host as saves do it,
        and written back as loads do it. `identical`: other KV that is written to the blocks is read from them. The
        blocks hold what they held before when this returns. Page-locked host memory is measured on a GPU only."""
        memory = _memory()
        last = min(memory.blocks, 1 + _COPIED_TOKENS // _block_tokens(memory))
        ids = range(1, last)  # block 0 belongs to no request
        return [
            row
            for is_pinned in ((False, True) if memory.tensors[0].is_cuda else (False,))
            for row in _copies(memory, ids, is_pinned=is_pinned)
        ]


def _copies(memory: PagedMemory, ids: Sequence[int], *, is_pinned: bool) -> list[dict[str, Any]]:
    tokens = len(ids) * _block_tokens(memory)
    shape = (len(memory.tensors), memory.layout.kv_heads, tokens, memory.layout.head_dim)
    dtype, destination = memory.tensors[0].dtype, memory.destination(ids)
    whole = slice(0, len(memory.tensors)), slice(0, tokens)
    keys, values = (torch.empty(shape, dtype=dtype, device="cpu", pin_memory=is_pinned) for _ in range(2))

    def save() -> None:
        for layer in range(len(keys)):
            found_keys, found_values = _read(memory, layer, ids)
            keys[layer].copy_(found_keys)
            values[layer].copy_(found_values)

    def load() -> None:
        destination.complete(*whole, keys, values)

    rows, size_bytes = [], keys.nbytes + values.nbytes
    for name, way in (("blocks to host", save), ("host to blocks", load)):
        times_s = [_seconds(way) for _ in range(_REPEATS)]
        rows.append(
            {
                "direction": name,
                "host_memory": "pinned" if is_pinned else "pageable",
                "MB": size_bytes / 1e6,
                "GBps": size_bytes / statistics.median(times_s) / 1e9,
            }
        )
    exchanged = digests(values, keys, tokens)
    destination.complete(*whole, values, keys)
    save()
    identical = digests(keys, values, tokens) == exchanged
    destination.complete(*whole, values, keys)
    return [row | {"identical": identical} for row in rows]


def _memory() -> PagedMemory:
    """What the connector in this process has registered."""
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    memory: PagedMemory = get_kv_transfer_group().memory
    return memory


def _block_tokens(memory: PagedMemory) -> int:
    return memory.layout.block_tokens * memory.layout.split


def _read(memory: PagedMemory, layer: int, ids: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    return memory.read_layer(layer, ids, len(ids) * _block_tokens(memory))


def _seconds(way: Callable[[], None]) -> float:
    """Both ways wait for their copies."""
    begin_s = time.perf_counter()
    way()
    return time.perf_counter() - begin_s
