"""The real thing: Ray, gRPC, processes, SmolLM2."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from kvstore_bench.demo.document import prompt_tokens, read_document
from kvstore_service.embedded import EmbeddedCluster
from kvstore_service.models import load_smollm2


@pytest.fixture(scope="session")
def smollm2() -> tuple[PreTrainedModel, Any]:
    return load_smollm2(torch.float32)


@pytest.fixture(scope="module")
def ray_cluster() -> Iterator[EmbeddedCluster]:
    with EmbeddedCluster() as cluster:
        yield cluster


def document_prompt(tokenizer: Any, tokens: int, question: str) -> torch.Tensor:
    return torch.tensor([prompt_tokens(tokenizer, read_document(None), question, tokens)])
