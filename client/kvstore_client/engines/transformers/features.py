"""What a calibration predicts KV from: the model's input embeddings."""

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from kvstore_codec.calibration import token_features
from kvstore_codec.identity import CHUNK_TOKENS


@torch.inference_mode()
def embedded(model: PreTrainedModel, tokens: torch.Tensor) -> torch.Tensor:
    """Input embeddings of `tokens`, i64 `[tokens]`: `[tokens, hidden]` in host memory, in the model's dtype.

    Asked of the module, as the model does it: some scale the rows of their weight, or keep it elsewhere. It only reads,
    so any thread may call it while the model computes."""
    module = model.get_input_embeddings()
    rows: torch.Tensor = module(tokens.to(model.device).unsqueeze(0))[0].cpu()
    return rows


class PromptFeatures:
    """`token_features` of a prompt's chunks, by index, made when they are asked for. Chunk `index` begins at
    `first_tokens[index]`, or where it does when the whole prompt is cut into chunks."""

    def __init__(
        self, model: PreTrainedModel, tokens: torch.Tensor, first_tokens: Sequence[int] | None = None
    ) -> None:
        self._model, self._tokens, self._first_tokens = model, tokens, first_tokens

    def __call__(self, chunk_index: int) -> torch.Tensor:
        firsts = self._first_tokens
        begin = chunk_index * CHUNK_TOKENS if firsts is None else firsts[chunk_index]
        return token_features(embedded(self._model, self._tokens[begin : begin + CHUNK_TOKENS]))
