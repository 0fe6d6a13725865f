"""What a worker needs to exchange KV whose keys are stored before RoPE, besides its KV memory."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch

from kvstore_client.engines.vllm.rotation import KeyRotation, RotatedDestination
from kvstore_client.fetch import ChunkFeatures, Destination
from kvstore_client.new_chunk import NewChunk
from kvstore_client.reuse.engine import TokenEmbeddings
from kvstore_client.reuse.features import PromptFeatures
from kvstore_codec.identity import CHUNK_TOKENS, ChunkId


@dataclass(frozen=True, slots=True)
class KeysBeforeRope:
    """Thread-safe."""

    rotation: KeyRotation
    embed: TokenEmbeddings

    def destination(self, inner: Destination) -> Destination:
        """Memory for fetched KV in front of `inner`, which holds keys after RoPE."""
        return RotatedDestination(inner, self.rotation)

    def features(self, token_ids: Sequence[int]) -> ChunkFeatures:
        """Features of the chunks that begin with these tokens of a prompt."""
        return PromptFeatures(self.embed, torch.tensor(token_ids, dtype=torch.int64, device="cpu"))

    def new_chunk(
        self,
        chunk_id: ChunkId,
        index: int,
        keys: torch.Tensor,
        values: torch.Tensor,
        token_ids: Sequence[int],
    ) -> NewChunk:
        """Chunk `index` of a prompt, to be stored. `keys` are after RoPE, `[layers, kv_heads, tokens, head_dim]`; they
        are rotated back in place when the chunk is gathered, which happens once, in the thread that stores it."""
        return NewChunk(
            chunk_id,
            partial(self._gather, index, keys, values),
            partial(self.features(token_ids), 0),
            begins_text=index == 0,
        )

    @torch.inference_mode()
    def _gather(
        self, index: int, keys: torch.Tensor, values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self.rotation.undo_(keys, slice(index * CHUNK_TOKENS, (index + 1) * CHUNK_TOKENS))
        return keys, values
