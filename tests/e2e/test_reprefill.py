"""SmolLM2 over a part of a long prefix, through a real cluster: how its answers change with the budget."""

from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from kvstore_bench.demo.document import read_document
from kvstore_client import connect
from kvstore_client.engines.transformers import CachedModel
from kvstore_service.embedded import EmbeddedCluster

pytestmark = pytest.mark.slow

PREFIX, QUESTION = 2048, 128
BUDGETS = (0.05, 0.25, 1.0)


def test_a_larger_budget_is_closer_to_full_reuse(
    smollm2: tuple[PreTrainedModel, Any], ray_cluster: EmbeddedCluster
) -> None:
    model, tokenizer = smollm2
    text = torch.tensor([tokenizer(read_document(None)).input_ids[: PREFIX + QUESTION]])
    with torch.inference_mode():
        logits = model(text, logits_to_keep=QUESTION).logits[0]
    exact = logits.float().log_softmax(-1)
    with connect(ray_cluster.address, lookup_timeout_s=10.0) as client:
        cached = CachedModel(model, client)
        cached.generate(text[:, :PREFIX], budget=1.0, do_sample=False, max_new_tokens=1)
        client.store.flush()
        divergence: list[float] = []
        for budget in BUDGETS:
            client.frame_cache.clear()
            found = cached.question_log_probabilities(text, budget=budget)
            divergence.append(float((exact.exp() * (exact - found)).sum(-1).mean()))
            report = cached.last_report.reprefill
            assert report is not None
            assert report.attended_tokens <= max(budget * PREFIX, 3 * 64)
            assert report.frames_missing == 0
        assert divergence[0] > divergence[1] > divergence[2]
        assert divergence[1] < 0.2
        assert abs(divergence[2]) < 1e-5
        cached.close()
