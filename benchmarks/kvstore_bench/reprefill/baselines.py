"""Makes the baselines: each with a file of its own, from the same KV."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import PreTrainedModel

from kvstore_bench.reprefill.block_cache import BlockCache, Rank, frequency_times_share, lfu, lru
from kvstore_bench.reprefill.h2o import AttentionStoreH2O
from kvstore_bench.reprefill.impress import Impress
from kvstore_bench.reprefill.kv_file import KVFile, KVShape
from kvstore_bench.reprefill.layerwise import Layerwise
from kvstore_bench.reprefill.prefix_kv import PrefixKV
from kvstore_bench.reprefill.prompts import Prompts
from kvstore_client.engines.transformers.decoder import Decoder
from kvstore_client.engines.transformers.rotary import rotary_tables
from kvstore_codec.errors import ConfigurationError
from kvstore_codec.rope import RotaryTable

_BLOCK_TOKENS = 64
NAMES = ("impress", "impress-16", "impress-reordered", "as_h2o_lru", "as_h2o_lfu")
_WARM_UP = 5
"""Questions whose important tokens decide the order of a reordered file."""


class Baselines:
    """`probes` is the number of probe heads of IMPRESS."""

    def __init__(
        self, model: PreTrainedModel, prompts: Prompts, kv: PrefixKV, folder: Path, probes: int
    ) -> None:
        self._prompts, self._folder = prompts, folder
        self._decoder = Decoder(model)
        self._keys, self._values = kv.keys, kv.values
        longest = max(len(question.tokens) for question in prompts.questions)
        tokens = len(prompts.prefix)
        self._rotary: RotaryTable = rotary_tables(model, tokens + longest, model.dtype, "cpu")[0]
        kv_heads, _, head_dim = self._keys[0].shape
        self._shape = KVShape(len(self._keys), kv_heads, tokens, head_dim, self._keys[0].dtype)
        self._probes = min(probes, kv_heads)

    def make(self, name: str, budget: float, cache_bytes: float, rate_Bps: float | None) -> Layerwise:  # noqa: N803
        """The baseline of this name, with its file written. Raises ConfigurationError for an unknown name."""
        if name not in NAMES:
            raise ConfigurationError(f"there is no system {name!r}; baselines are {', '.join(NAMES)}")
        is_impress = name.startswith("impress")
        chunk_tokens = 16 if name == "impress-16" else _BLOCK_TOKENS
        path = self._folder / f"{name}.kv"
        file = KVFile(path, self._shape, chunk_tokens, self._probes if is_impress else 0, rate_Bps)
        keys, values = self._keys, self._values
        if name == "impress-reordered":
            orders = self._orders(budget)
            keys, values = (
                [tensor[:, order] for tensor, order in zip(tensors, orders, strict=True)]
                for tensors in (keys, values)
            )
        file.write(keys, values)
        parts = (name, self._decoder, self._prompts, self._rotary, file, budget)
        if is_impress:
            return Impress(*parts, BlockCache(cache_bytes, frequency_times_share))
        rank: Rank = lru if name == "as_h2o_lru" else lfu
        return AttentionStoreH2O(*parts, BlockCache(cache_bytes, rank))

    def _orders(self, budget: float) -> list[torch.Tensor]:
        """Each layer's tokens, those first that were important for the most questions, i64 `[tokens]`."""
        file = KVFile(self._folder / "votes.kv", self._shape, _BLOCK_TOKENS, self._probes, None)
        file.write(self._keys, self._values)
        plain = Impress("votes", self._decoder, self._prompts, self._rotary, file, budget, BlockCache(0, lru))
        for question in self._prompts.questions[:_WARM_UP]:
            plain.log_probabilities(question)
        plain.close()
        return [votes.argsort(descending=True, stable=True) for votes in plain.votes]
