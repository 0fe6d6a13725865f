"""Reuse does not depend on what the engine set for its process: default device, default dtype, inference mode."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import pytest
import torch

from kvstore_client import connect
from kvstore_client.engines.transformers import CachedModel
from tests.client.conftest import ServedCluster
from tests.client.models import random_prompt, tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")

GREEDY = {"max_new_tokens": 6, "do_sample": False}


@contextmanager
def default_device() -> Iterator[None]:
    """Stands for cuda: where nobody names a device, a tensor has no bytes."""
    torch.set_default_device("meta")
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(mode=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(mode=False)


DEFAULTS: dict[str, Callable[[], AbstractContextManager[object]]] = {
    "device": default_device,
    "device-context": lambda: torch.device("meta"),
    "float64": lambda: default_dtype(torch.float64),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "deterministic": deterministic,
    "inference": torch.inference_mode,
}


@pytest.mark.parametrize("defaults", DEFAULTS)
def test_store_and_fetch_under_other_defaults(cluster: ServedCluster, defaults: str) -> None:
    prompt, changed = random_prompt(700, seed=1), random_prompt(700, seed=1).clone()
    with connect(cluster.address) as client:
        model = tiny_model("llama")
        with DEFAULTS[defaults]():
            cached = CachedModel(model, client)
            cached.generate(prompt, **GREEDY)
            client.store.flush()
            under = cached.generate(changed, **GREEDY)
        assert cached.last_report.reused_tokens == 512, cached.last_report.why_not
        assert torch.equal(under, cached.generate(prompt, **GREEDY))
        assert client.metrics.snapshot().get("chunks_missing", 0) == 0


@pytest.mark.parametrize("selector", ["focus", "frequency", "random"])
def test_segments_under_another_default_device(cluster: ServedCluster, selector: str) -> None:
    one, two, question = (random_prompt(n, seed=n) for n in (512, 513, 20))
    with connect(cluster.address, recompute_selector=selector) as client:
        model = tiny_model("llama")
        with default_device():
            cached = CachedModel(model, client)
            cached.generate(torch.cat([one, two, question], 1), segments=[512, 513, 20], **GREEDY)
            client.store.flush()
            swapped = torch.cat([two, one, question], 1)
            under = cached.generate(swapped, segments=[513, 512, 20], **GREEDY)
        assert cached.last_report.approximate_tokens, cached.last_report.why_not
        client.store.flush()
        assert torch.equal(under, cached.generate(swapped, segments=[513, 512, 20], **GREEDY))
