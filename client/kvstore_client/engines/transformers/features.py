"""What a calibration predicts KV from: the model's input embeddings."""

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
    """`token_features` of a prompt's chunks, by index, made when they are asked for."""

    def __init__(self, model: PreTrainedModel, tokens: torch.Tensor) -> None:
        self._model, self._tokens = model, tokens

    def __call__(self, chunk_index: int) -> torch.Tensor:
        begin = chunk_index * CHUNK_TOKENS
        return token_features(embedded(self._model, self._tokens[begin : begin + CHUNK_TOKENS]))
