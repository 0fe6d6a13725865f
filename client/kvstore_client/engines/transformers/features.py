"""Input embeddings of tokens, from which a calibration predicts KV."""

import torch
from transformers import PreTrainedModel


@torch.inference_mode()
def embedded(model: PreTrainedModel, tokens: torch.Tensor) -> torch.Tensor:
    """Input embeddings of `tokens`, i64 `[tokens]`: `[tokens, hidden]` in host memory, in the model's dtype.

    Calls the embedding module as the model does: some modules scale the rows of their weight, or keep it elsewhere. The
    call only reads, so any thread may make it while the model computes.
    """
    module = model.get_input_embeddings()
    rows: torch.Tensor = module(tokens.to(model.device).unsqueeze(0))[0].cpu()
    return rows
