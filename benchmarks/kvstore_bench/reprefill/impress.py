"""IMPRESS, as far as its publication says: important tokens by probe heads, chunks that hold them read in time.

Each layer reads the keys of its probe heads whole, synchronously, scores the prefix's tokens with them, and reads the
chunks that hold important tokens, without the keys that it has. A model with as many KV heads as probes reads all its
keys. Layers whose probes disagree read everything. The file's order of tokens may put those together that earlier
questions found important (reordering): keys are stored after RoPE, so their order does not matter to attention.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from kvstore_bench.reprefill.block_cache import BlockCache
from kvstore_bench.reprefill.kv_file import KVFile
from kvstore_bench.reprefill.layerwise import Counts, Layerwise, token_scores
from kvstore_bench.reprefill.prompts import Prompts
from kvstore_client.engines.transformers.decoder import Decoder
from kvstore_codec.rope import RotaryTable

_AGREEING = 0.6
"""Jaccard similarity of the probes' sets of important tokens; a layer below it reads everything."""


class Impress(Layerwise):
    """Reads synchronously, and keeps chunks by frequency x share of important tokens."""

    def __init__(
        self,
        name: str,
        decoder: Decoder,
        prompts: Prompts,
        rotary: RotaryTable,
        file: KVFile,
        budget: float,
        cache: BlockCache,
    ) -> None:
        super().__init__(name, decoder, prompts, rotary, file, budget, cache)
        self.votes = torch.zeros(decoder.layers, file.shape.tokens, device="cpu")
        """For how many questions each stored token of each layer was important."""

    def chosen(self, layer: int, queries: torch.Tensor, counts: Counts) -> tuple[torch.Tensor, torch.Tensor]:
        file = self.file
        began_s = time.perf_counter()
        probes = file.read_probes(layer)
        counts.waited_s += time.perf_counter() - began_s
        counts.reading_s = counts.waited_s
        group = queries.shape[0] // file.shape.kv_heads
        scores = token_scores(queries[: file.probes * group], probes, self.decoder.scale(layer))
        important = scores.sum(0).topk(self.count).indices
        if _disagree(scores, self.count):
            important = torch.arange(file.shape.tokens, device="cpu")
        self.votes[layer, important] += 1
        tokens = important.sort().values
        chunk_of = tokens // file.chunk_tokens
        per_chunk = torch.bincount(chunk_of, minlength=file.chunks)
        wanted: list[int] = per_chunk.nonzero().flatten().tolist()
        blocks = self._load(layer, wanted, per_chunk, counts)
        rows = torch.cat([blocks[chunk] for chunk in wanted], 1)
        places = torch.searchsorted(torch.tensor(wanted, device="cpu"), chunk_of) * file.chunk_tokens
        places += tokens % file.chunk_tokens
        other_keys, values = rows[:, places].tensor_split([file.shape.kv_heads - file.probes])
        return torch.cat((probes[:, tokens], other_keys)), values

    def _load(
        self, layer: int, wanted: Sequence[int], important: torch.Tensor, counts: Counts
    ) -> dict[int, torch.Tensor]:
        file = self.file
        began_s = time.perf_counter()
        blocks, missing = self._blocks(layer, wanted, counts)
        counts.waited_s += time.perf_counter() - began_s
        counts.reading_s = counts.waited_s
        counts.bytes_needed += int(important[missing].sum()) * file.shape.token_bytes
        for chunk in wanted:
            share = float(important[chunk]) / file.chunk_tokens
            self._cache.used((layer, chunk), blocks[chunk], share)
        return blocks


def _disagree(scores: torch.Tensor, count: int) -> bool:
    sets = [set(row.topk(count).indices.tolist()) for row in scores]
    first = sets[0]
    return any(len(first & other) < _AGREEING * len(first | other) for other in sets[1:])
