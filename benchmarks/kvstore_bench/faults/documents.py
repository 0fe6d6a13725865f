"""Documents for the benchmark. Their KV is derived from a number, so that any wrong byte is detected."""

from dataclasses import dataclass

import torch

from kvstore_client.new_chunk import NewChunk
from kvstore_codec.identity import CHUNK_TOKENS, ChunkId, chunk_ids
from kvstore_codec.model_spec import KVDtype, ModelSpec

ENCODING = "exact-raw"
SPEC = ModelSpec(
    model_id="kvstore bench faults",
    weights_digest=bytes(32),
    layers=2,
    kv_heads=1,
    head_dim=16,
    dtype=KVDtype.BFLOAT16,
    rope=None,
)
CHUNKS = 4
"""Chunks per document, with 32 KiB of KV each."""


@dataclass(frozen=True, slots=True)
class Document:
    """A text with a unique beginning, and its KV."""

    number: int

    def ids(self) -> list[ChunkId]:
        tokens = CHUNKS * CHUNK_TOKENS
        return chunk_ids(SPEC.digest, b"", range(self.number * tokens, (self.number + 1) * tokens))

    def chunks(self) -> list[NewChunk]:
        return [NewChunk(id_, lambda i=index: self.kv(i)) for index, id_ in enumerate(self.ids())]  # type: ignore[misc]

    def kv(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of a chunk, `[layers, kv_heads, tokens, head_dim]` each: random 16-bit patterns with NaNs."""
        generator = torch.Generator().manual_seed(self.number * CHUNKS + index)
        shape = (2, SPEC.layers, SPEC.kv_heads, CHUNK_TOKENS, SPEC.head_dim)
        words = torch.randint(-(1 << 15), 1 << 15, shape, generator=generator, dtype=torch.int16)
        keys, values = words.view(torch.bfloat16)
        return keys, values

    def wrong_bytes(self, keys: torch.Tensor, values: torch.Tensor, delivered: int) -> int:
        """Number of wrong bytes in the first `delivered` chunks; tensors are `[layers, kv_heads, tokens, head_dim]`."""
        wrong = 0
        for index in range(delivered):
            tokens = slice(index * CHUNK_TOKENS, (index + 1) * CHUNK_TOKENS)
            for found, expected in zip((keys, values), self.kv(index), strict=True):
                same = found[:, :, tokens].contiguous().view(torch.uint8) == expected.contiguous().view(
                    torch.uint8
                )
                wrong += int((~same).sum())
        return wrong
