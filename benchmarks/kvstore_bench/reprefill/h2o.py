"""AttentionStore with H2O: the whole prefix is read in fixed blocks, each layer while the one before it computes, and
each layer then attends to the tokens of the highest attention only."""

from __future__ import annotations

import time
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from kvstore_bench.reprefill.block_cache import BlockCache
from kvstore_bench.reprefill.kv_file import KVFile
from kvstore_bench.reprefill.layerwise import Counts, Layerwise, token_scores
from kvstore_bench.reprefill.prompts import Prompts
from kvstore_client.engines.transformers.decoder import Decoder
from kvstore_codec.rope import RotaryTable


class AttentionStoreH2O(Layerwise):
    """Reads one layer ahead, and keeps blocks by the cache's rank."""

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
        self._reader = ThreadPoolExecutor(1, "h2o-read")
        self._ahead: tuple[int, Future[torch.Tensor]] | None = None

    def chosen(self, layer: int, queries: torch.Tensor, counts: Counts) -> tuple[torch.Tensor, torch.Tensor]:
        began_s = time.perf_counter()
        if self._ahead is None or self._ahead[0] != layer:
            self._ahead = layer, self._reader.submit(self._read, layer, counts)
        keys, values = self._ahead[1].result()
        counts.waited_s += time.perf_counter() - began_s
        self._ahead = None
        if layer + 1 < self.decoder.layers:
            self._ahead = layer + 1, self._reader.submit(self._read, layer + 1, counts)
        scores = token_scores(queries, keys, self.decoder.scale(layer)).sum(0)
        places = scores.topk(self.count).indices.sort().values
        return keys[:, places], values[:, places]

    def close(self) -> None:
        self._reader.shutdown()
        super().close()

    def _read(self, layer: int, counts: Counts) -> torch.Tensor:
        """Keys and values of a whole layer, `[2, kv_heads, tokens, head_dim]`."""
        file = self.file
        began_s = time.perf_counter()
        blocks, _ = self._blocks(layer, range(file.chunks), counts)
        for chunk, block in sorted(blocks.items()):
            self._cache.used((layer, chunk), block)
        counts.reading_s += time.perf_counter() - began_s
        counts.bytes_needed += self.count * file.shape.token_bytes
        joined = torch.cat([blocks[chunk] for chunk in range(file.chunks)], 1)
        return joined.view(2, file.shape.kv_heads, *joined.shape[1:])
