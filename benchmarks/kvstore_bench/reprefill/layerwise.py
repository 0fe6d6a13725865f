"""A question over chosen tokens of a prefix in a local file: what the baselines have in common."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kvstore_bench.reprefill.block_cache import BlockCache
from kvstore_bench.reprefill.kv_file import KVFile
from kvstore_bench.reprefill.prompts import Prompts, Question
from kvstore_bench.reprefill.systems import Asked
from kvstore_client.contiguous.executor import SCORED_TOKENS
from kvstore_client.engines.transformers.decoder import Decoder
from kvstore_client.reuse.blend.attention import CausalBlocks
from kvstore_codec.rope import RotaryTable


@dataclass(slots=True)
class Counts:
    """What one question did."""

    tokens_read: int = 0
    bytes_needed: int = 0
    blocks: int = 0
    blocks_cached: int = 0
    waited_s: float = 0.0
    reading_s: float = 0.0


class Layerwise(ABC):
    """Computes a question layer by layer. Subclasses bring each layer's chosen KV."""

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
        self.name = name
        self.decoder, self.file = decoder, file
        self.count = max(1, int(budget * len(prompts.prefix)))
        """Tokens that each layer attends to."""
        self._prompts, self._rotary, self._cache = prompts, rotary, cache

    @abstractmethod
    def chosen(self, layer: int, queries: torch.Tensor, counts: Counts) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of the tokens that this layer's queries, `[heads, tokens, head_dim]`, attend to,
        `[kv_heads, chosen, head_dim]` each."""

    def ask(self, question: Question) -> Asked:
        read = self.file.bytes_read
        counts = Counts()
        began_s = time.perf_counter()
        states = self._compute(question, counts)
        self.decoder.log_probabilities(states[:, -1:]).argmax()
        ttft_s = time.perf_counter() - began_s
        return Asked(
            ttft_s,
            self.file.bytes_read - read,
            counts.bytes_needed,
            counts.tokens_read / self.decoder.layers,
            counts.blocks_cached / max(1, counts.blocks),
            counts.waited_s,
            counts.reading_s,
        )

    @torch.inference_mode()
    def log_probabilities(self, question: Question) -> torch.Tensor:
        return self.decoder.log_probabilities(self._compute(question, Counts()))

    def close(self) -> None:
        self.file.close()

    def _blocks(
        self, layer: int, wanted: Sequence[int], counts: Counts
    ) -> tuple[dict[int, torch.Tensor], list[int]]:
        """The wanted chunks of a layer, by number, from the cache or the file, and the numbers of those that were
        read."""
        blocks = {c: kept for c in wanted if (kept := self._cache.get((layer, c))) is not None}
        missing = [chunk for chunk in wanted if chunk not in blocks]
        blocks |= self.file.read_chunks(layer, missing)
        counts.blocks += len(wanted)
        counts.blocks_cached += len(wanted) - len(missing)
        counts.tokens_read += len(missing) * self.file.chunk_tokens
        return blocks, missing

    @torch.inference_mode()
    def _compute(self, question: Question, counts: Counts) -> torch.Tensor:
        decoder, tokens, prefix = self.decoder, question.tokens, len(self._prompts.prefix)
        hidden = decoder.embed(tokens)
        rotary = self._rotary.at(slice(prefix, prefix + len(tokens)))
        for layer in range(decoder.layers):
            made = decoder.project(layer, hidden, rotary)
            keys, values = self.chosen(layer, made.queries[:, -SCORED_TOKENS:], counts)
            held = keys.shape[1]
            mask = CausalBlocks(torch.arange(held, held + len(tokens), device="cpu"), keys.dtype)
            keys, values = torch.cat((keys, made.keys), 1), torch.cat((values, made.values), 1)
            hidden = decoder.finish(
                layer, hidden, mask.attend(made.queries, keys, values, decoder.scale(layer))
            )
        return hidden


def token_scores(queries: torch.Tensor, keys: torch.Tensor, scale: float) -> torch.Tensor:
    """Attention of `queries`, `[heads, tokens, head_dim]`, over `keys`, `[kv_heads, prefix, head_dim]`, summed over
    query tokens and the query heads of each KV head, f32 `[kv_heads, prefix]`."""
    asked = queries.float().reshape(len(keys), -1, queries.shape[-1]) * scale
    return (asked @ keys.float().transpose(1, 2)).softmax(-1).sum(1)
