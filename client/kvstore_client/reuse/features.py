"""Input embeddings of tokens, from which a calibration predicts KV."""

from collections.abc import Sequence
from functools import partial

import torch

from kvstore_client.reuse.engine import TokenEmbeddings
from kvstore_codec.calibration import token_features
from kvstore_codec.identity import CHUNK_TOKENS


class PromptFeatures:
    """`token_features` of a prompt's chunks, by index, computed on demand. Chunk `index` begins at
    `first_tokens[index]`; by default at `index * CHUNK_TOKENS`."""

    def __init__(
        self, embed: TokenEmbeddings, tokens: torch.Tensor, first_tokens: Sequence[int] | None = None
    ) -> None:
        self._embed, self._tokens, self._first_tokens = embed, tokens, first_tokens

    def __call__(self, chunk_index: int) -> torch.Tensor:
        firsts = self._first_tokens
        begin = chunk_index * CHUNK_TOKENS if firsts is None else firsts[chunk_index]
        return token_features(self._embed(self._tokens[begin : begin + CHUNK_TOKENS]))


def features_of(embed: TokenEmbeddings, tokens: Sequence[int], begin: int) -> partial[torch.Tensor]:
    """Features of the chunk at position `begin`, computed later. Its tokens are embedded now, because the weights may
    change before the chunk is stored."""
    return partial(token_features, embed(torch.tensor(tokens[begin : begin + CHUNK_TOKENS], device="cpu")))
