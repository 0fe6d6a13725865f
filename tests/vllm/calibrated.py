"""A small model whose lossy KV can be exchanged: saved as a checkpoint, with a calibration that the project fitted."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from kvstore_client.client import connect
from kvstore_client.engines.transformers.calibrate import ObservedModel
from kvstore_codec.calibration import Calibration
from kvstore_service.calibration import Options, calibrate, plan_passages
from tests.vllm.processes import prompt

CALIBRATED_TOKENS = 2400


class Silent:
    def advance(self, stage: str, done: int, total: int) -> None: ...

    def note(self, text: str) -> None: ...


def saved_sharp_model(folder: Path, seed: int = 0) -> Path:
    """Random weights, but large enough for the model to mind what its KV is."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4, "head_dim": 32}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 8192}
    ends = {"bos_token_id": 1, "eos_token_id": None, "pad_token_id": None}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=512, **sizes, **heads, **ends))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
    model.save_pretrained(folder)
    return folder


def loaded_model(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def calibration_of(folder: Path) -> Calibration:
    plan = plan_passages([torch.tensor(prompt(CALIBRATED_TOKENS, seed=99))], 10**6, 8192)
    return calibrate(ObservedModel(loaded_model(folder)), plan, Options(period_layers=2, rank=8), Silent())


def publish(
    address: str, cache_dir: Path, calibration: Calibration, model_digest: bytes | None = None
) -> None:
    with connect(address, cache_dir=cache_dir) as client:
        client.calibrations.publish(calibration.to_bytes(), model_digest or calibration.model_digest)
