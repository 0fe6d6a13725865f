"""One worker's model is changed after it was wrapped, another worker's is not; both use one cluster."""

import random
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from kvstore_client import KVStoreClient, connect
from kvstore_client.engines.transformers import CachedModel
from tests.client.conftest import served_cluster
from tests.client.identity.changes import CHANGES, Change
from tests.client.models import random_prompt, tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")

GREEDY = {"do_sample": False, "max_new_tokens": 6}
LAYERS = 3
_EXTRA = {
    "gemma3": {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"], "head_dim": 16},
    "qwen2": {"use_sliding_window": True, "sliding_window": 96, "max_window_layers": 2},
}


def model_of(family: str) -> PreTrainedModel:
    """Random weights, but large enough for the answer to depend on the KV."""
    model = tiny_model(family, num_hidden_layers=LAYERS, **_EXTRA.get(family, {}))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(5)
    return model


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[KVStoreClient]:
    folder: Path = tmp_path_factory.mktemp("cluster")
    with served_cluster(folder) as cluster, connect(cluster.address, lookup_timeout_s=20.0) as client:
        yield client


@pytest.fixture(scope="module")
def outcomes() -> Iterator[Counter[str]]:
    counts: Counter[str] = Counter()
    yield counts
    print(f"\n{counts.total()} changes: {dict(counts)}")


@cache
def plain_worker(client: KVStoreClient, family: str) -> CachedModel:
    return CachedModel(model_of(family), client)


def answer(cached: CachedModel, prompt: torch.Tensor) -> torch.Tensor:
    output: torch.Tensor = cached.generate(prompt, **GREEDY)
    cached.client.store.flush()
    return output


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_model_and_a_plain_one_answer_as_without_the_cluster(
    client: KVStoreClient, outcomes: Counter[str], name: str
) -> None:
    draw = random.Random(name)
    check(client, outcomes, CHANGES[name], draw.choice(CHANGES[name].families), draw)


def some_families(name: str) -> list[str]:
    """Two of the families that have a change. All families are among those of all changes."""
    families = CHANGES[name].families
    return random.Random(name[::-1]).sample(families, min(2, len(families)))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "family"), [(n, f) for n in CHANGES for f in some_families(n)])
def test_so_do_models_of_other_families(
    client: KVStoreClient, outcomes: Counter[str], name: str, family: str
) -> None:
    check(client, outcomes, CHANGES[name], family, random.Random(f"{name} {family}"))


def check(
    client: KVStoreClient, outcomes: Counter[str], change: Change, family: str, draw: random.Random
) -> None:
    torch.manual_seed(draw.randrange(1000))
    prompt = random_prompt(270, seed=draw.randrange(10**6))
    plain = plain_worker(client, family)
    changed = CachedModel(model_of(family), client)
    wrapped_as = changed.spec.digest
    # Some changes are of the whole process: a comparison under way would begin anew after a pause.
    assert plain.canary.refusal(plain.spec, wait_s=30) is None

    undo = change.apply(changed.model, draw)
    try:
        own = changed.model.generate(prompt, **GREEDY)
        assert torch.equal(answer(changed, prompt), own)
        report = changed.last_report
        assert report.reused_tokens == 0
        if change.outcome in ("apart", "same"):
            assert report.bypassed is None
            assert (changed.spec.digest != wrapped_as) == (change.outcome == "apart")
            assert torch.equal(answer(changed, prompt), own)
            assert changed.last_report.reused_tokens == 256, "its own KV is reused"
        else:
            assert report.bypassed == change.outcome
            assert client.metrics.snapshot()[f"miss_bypass_{change.outcome}"]
    finally:
        if undo is not None:
            undo()

    plains_own = plain.model.generate(prompt, **GREEDY)
    assert torch.equal(answer(plain, prompt), plains_own)
    assert plain.last_report.reused_tokens == (256 if change.outcome == "same" else 0)
    assert torch.equal(answer(plain, prompt), plains_own)
    assert plain.last_report.reused_tokens == 256
    if undo is None:  # the plain worker's KV is stored now
        assert torch.equal(answer(changed, prompt), own)
        if change.outcome not in ("apart", "same"):
            assert changed.last_report.bypassed == change.outcome
    changed.close()
    outcomes["named apart" if change.outcome == "apart" else change.outcome] += 1
