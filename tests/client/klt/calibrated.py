"""A model whose KV is coded with a calibration that the project fitted, and its prompt."""

import torch
from transformers import PreTrainedModel

from kvstore_client import KVStoreClient, connect
from kvstore_client.engines.transformers import CachedModel
from kvstore_codec.calibration import Calibration
from tests.client.models import random_prompt, tiny_model

MEDIUM = "medium-klt-pco"
GREEDY = {"do_sample": False, "max_new_tokens": 4}
PROMPT = random_prompt(600, seed=1)


class Silent:
    def advance(self, stage: str, done: int, total: int) -> None: ...

    def note(self, text: str) -> None: ...


def sharp_model() -> PreTrainedModel:
    """Random weights, but large enough for the model to mind what its KV is."""
    model = tiny_model()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(6)
    return model


def publish(address: str, calibration: Calibration) -> None:
    with connect(address) as client:
        client.calibrations.publish(calibration.to_bytes(), calibration.model_digest)


def counted(client: KVStoreClient, reason: str) -> int:
    return client.metrics.snapshot().get(f"miss_{reason}", 0)


def wait_for_calibration(cached: CachedModel) -> None:
    assert cached.client.prepare(cached.spec).result(20) is not None
