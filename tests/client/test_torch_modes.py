"""Ways in which torch can be told to compute otherwise for a while: calls made meanwhile are left alone."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from kvstore_client import KVStoreClient, connect
from kvstore_client.engines.transformers import CachedModel
from tests.client.conftest import ServedCluster
from tests.client.models import random_prompt, tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")

GREEDY = {"do_sample": False, "max_new_tokens": 6}
PROMPT = random_prompt(600, seed=70)


@pytest.fixture
def client(cluster: ServedCluster) -> Iterator[KVStoreClient]:
    with connect(cluster.address, fetch_policy="fixed") as client:
        yield client


class Scales(TorchDispatchMode):
    def __torch_dispatch__(self, function: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = function(*args, **(kwargs or {}))
        return output * 1.3 if "mm" in str(function) else output


class ScalesProducts(TorchFunctionMode):
    def __torch_function__(self, function: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = function(*args, **(kwargs or {}))
        return output * 1.3 if function is torch.nn.functional.linear else output


@pytest.mark.parametrize(
    ("mode", "reason"),
    [
        (Scales(), "dispatch_mode"),
        (ScalesProducts(), "function_mode"),
        (torch.autocast("cpu", torch.bfloat16), "autocast"),
    ],
)
def test_calls_that_torch_is_told_to_compute_otherwise_run_without_reuse(
    cluster: ServedCluster, client: KVStoreClient, mode: Any, reason: str
) -> None:
    cached = CachedModel(tiny_model(), client)
    with torch.device("cpu"):  # a mode of torch's own that changes no value
        plain = cached.generate(PROMPT, **GREEDY)
    client.store.flush()
    assert cached.last_report.bypassed is None
    stored = cluster.stored_chunks()
    begun = cached.begin(PROMPT, **GREEDY)
    with mode:
        own = cached.model.generate(PROMPT, **GREEDY)
        for answer in (cached.generate(PROMPT, **GREEDY), cached.finish(begun)):
            assert torch.equal(answer, own)
            assert cached.last_report.bypassed == reason
        assert not cached.is_stored(PROMPT, **GREEDY)
        cached.generate(random_prompt(600, seed=71), **GREEDY)
    client.store.flush()
    assert cluster.stored_chunks() == stored
    assert torch.equal(cached.generate(PROMPT, **GREEDY), plain)
    assert cached.last_report.bypassed is None
    assert cached.last_report.reused_tokens > 0
