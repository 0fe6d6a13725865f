"""What a calibration predicts KV from: the model's input embeddings."""

import torch
from transformers import PreTrainedModel


@torch.inference_mode()
def embedded(model: PreTrainedModel, tokens: torch.Tensor) -> torch.Tensor:
    """Input embeddings of `tokens`, i64 `[tokens]`: `[tokens, hidden]` in host memory, in the model's dtype.

    Asked of the module, as the model does it: some scale the rows of their weight, or keep it elsewhere. It only reads,
    so any thread may call it while the model computes."""
    module = model.get_input_embeddings()
    rows: torch.Tensor = module(tokens.to(model.device).unsqueeze(0))[0].cpu()
    return rows
