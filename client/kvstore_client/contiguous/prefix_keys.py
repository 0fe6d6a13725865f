"""The keys of a prefix, as far as its summaries tell them, and what queries find among them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from kvstore_client.contiguous.summaries import BITS, LEVELS, PER_BYTE, STEP, ChunkSummary, SummaryShape
from kvstore_codec.klt import compute_dtype

_BLOCK_TOKENS = 2048
"""Keys whose products with a KV head's queries are computed at once on a processor. Of 4,096 keys in two threads: 3.8
ms instead of 5.3 for 192 queries of each KV head, 4.7 instead of 7.3 for 225, 2.9 instead of 2.6 for 90. With 1,024
keys or all 4,096 there are 4.0, 4.9 and 3.4, or 4.1, 5.6 and 2.6."""

_QUERIES_AT_ONCE = 16
"""Queries are padded to a multiple of this many. Of 4,096 keys, products with 90 queries of each KV head take 3.5 ms in
one thread, and with 96 2.3 ms."""


class PrefixKeys:
    """The keys of a prefix as its summaries tell them. Thread-safe."""

    def __init__(self, summaries: Sequence[ChunkSummary], shape: SummaryShape) -> None:
        self.shape = shape
        self._places = {layer: place for place, layer in enumerate(shape.layers)}
        self._integers, self._scales = (
            torch.from_numpy(np.concatenate(parts, axis=3))
            for parts in ([one.integers for one in summaries], [one.scales for one in summaries])
        )
        self._levels = torch.from_numpy(np.concatenate([one.levels for one in summaries], axis=2))

    def best_products(self, layer: int, queries: torch.Tensor, frame_tokens: int) -> torch.Tensor:
        """Largest product of each query with a key of each frame of `frame_tokens` keys of a scored layer, f32
        `[kv_heads, frames, queries]` on the queries' device, from rotated queries `[kv_heads, queries, head_dim]`, f32.

        Keys are the mean of their unit plus a deviation. Products with deviations, which are most of the work, are in
        bfloat16 where the machine has instructions for it; products with means, which may be far larger, are not."""
        padding = -queries.shape[1] % _QUERIES_AT_ONCE
        asked = _by_place(torch.nn.functional.pad(queries, (0, 0, 0, padding)))
        unit_tokens = self.shape.unit_tokens
        part_tokens = math.gcd(frame_tokens, unit_tokens)
        frame_parts, unit_parts = frame_tokens // part_tokens, unit_tokens // part_tokens
        means, steps = self._means_and_steps(layer, queries.device)
        deviations = self._deviations(layer, steps)
        middles = (means @ asked.transpose(1, 2)).repeat_interleave(unit_parts, 1)
        heads, tokens, count = *deviations.shape[:2], asked.shape[1]
        best = middles.new_empty(heads, tokens // frame_tokens, count)
        # Some chunks at a time, in memory that is used again: all products are as large as the prefix is long, and
        # fresh memory costs up to a third of the time. Many small steps would keep another device waiting.
        block_tokens = max(1, _BLOCK_TOKENS // frame_tokens) * frame_tokens if queries.is_cpu else tokens
        memory = deviations.new_empty(min(block_tokens, tokens), count)
        for head, rows in enumerate(asked.to(deviations.dtype).transpose(1, 2)):
            for begin in range(0, tokens, block_tokens):
                block = slice(begin, min(tokens, begin + block_tokens))
                products = memory[: block.stop - begin]
                torch.mm(deviations[head, block], rows, out=products)
                found = products.view(-1, part_tokens, count).amax(1).float()
                found += middles[head, begin // part_tokens : block.stop // part_tokens]
                of_block = slice(begin // frame_tokens, block.stop // frame_tokens)
                torch.amax(found.view(-1, frame_parts, count), 1, out=best[head, of_block])
        return best[:, :, : queries.shape[1]]

    def _means_and_steps(self, layer: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Of each unit of a scored layer, the middle of its levels and the distance between them, f32
        `[kv_heads, units, channels]`, with channels in the order of `_by_place`."""
        place = self._places[layer]
        integers, scales = self._integers[:, place].to(device), self._scales[:, place].to(device)
        means, deviations = integers.float() * scales[..., None]
        return _by_place(means), _by_place(deviations.mul_(STEP))

    def _deviations(self, layer: int, steps: torch.Tensor) -> torch.Tensor:
        """Keys of a scored layer without their units' means, `[kv_heads, tokens, channels]`, with channels in the order
        of `_by_place`: so they are unpacked by a few operations on whole tensors, in half the time."""
        packed = self._levels[self._places[layer]].to(steps.device)
        levels = torch.empty(
            *packed.shape[:2], PER_BYTE, packed.shape[2], dtype=compute_dtype(), device=steps.device
        )
        for number in range(PER_BYTE):
            levels[:, :, number] = (packed >> number * BITS) & (LEVELS - 1)
        by_unit = levels.view(*steps.shape[:2], self.shape.unit_tokens, -1)
        by_unit.sub_((LEVELS - 1) / 2).mul_(steps[:, :, None])
        return by_unit.flatten(1, 2)


def _by_place(channels: torch.Tensor) -> torch.Tensor:
    """`[..., head_dim]` with the channels whose levels have the same place in their byte together, padded with zeros to
    whole bytes."""
    padded = torch.nn.functional.pad(channels, (0, -channels.shape[-1] % PER_BYTE))
    return padded.view(*padded.shape[:-1], -1, PER_BYTE).transpose(-1, -2).flatten(-2)
