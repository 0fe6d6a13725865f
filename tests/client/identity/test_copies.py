"""A wrapped model may be copied, saved and pickled; its wrapper may not."""

import copy
import io
import pickle
from collections.abc import Callable, Iterator

import pytest
import torch

from kvstore_client import KVStoreClient, connect
from kvstore_client.engines.transformers import CachedModel
from kvstore_client.engines.transformers.requests import RequestQueue
from kvstore_client.reuse.capture import KeyCapture
from kvstore_codec.errors import NotCopyableError
from tests.client.conftest import ServedCluster
from tests.client.models import random_prompt, tiny_model

GREEDY = {"do_sample": False, "max_new_tokens": 6}
PROMPT = random_prompt(600, seed=41)


@pytest.fixture
def client(cluster: ServedCluster) -> Iterator[KVStoreClient]:
    with connect(cluster.address) as client:
        yield client


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, pickle.dumps])
def test_a_wrapper_says_what_to_copy_instead(
    client: KVStoreClient, copied: Callable[[object], object]
) -> None:
    cached = CachedModel(tiny_model(), client)
    with pytest.raises(NotCopyableError, match=r"cached\.model.*CachedModel\(copy, client\)"):
        copied(cached)
    queue = RequestQueue(cached)
    with pytest.raises(NotCopyableError, match="create another"):
        copied(queue)
    queue.close()


def pickled(model: torch.nn.Module) -> torch.nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
def test_a_copy_of_a_wrapped_model_is_one_of_its_own(
    cluster: ServedCluster, client: KVStoreClient, copied: Callable[[torch.nn.Module], torch.nn.Module]
) -> None:
    cached = CachedModel(tiny_model(), client)
    other = copied(cached.model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)

    class AsksTheCopy:
        """A logits processor that has the copy compute in the middle of the original's call."""

        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            other(input_ids)
            return scores

    cached.generate(PROMPT, logits_processor=[AsksTheCopy()], **GREEDY)
    client.store.flush()
    assert cluster.stored_chunks() == 2
    plain = CachedModel(tiny_model(), client)
    assert torch.equal(plain.generate(PROMPT, **GREEDY), plain.model.generate(PROMPT, **GREEDY))
    assert plain.last_report.reused_tokens == 512

    wrapped = CachedModel(other, client)
    for reused in (0, 512):
        assert torch.equal(wrapped.generate(PROMPT, **GREEDY), other.generate(PROMPT, **GREEDY))
        assert wrapped.last_report.bypassed is None
        assert wrapped.last_report.reused_tokens == reused
        client.store.flush()


def test_hooks_of_a_copy_record_nothing_of_the_original(client: KVStoreClient) -> None:
    """Also when the copy's passes end at a projection, between one of the original's and its cache."""
    cached = CachedModel(tiny_model(), client)
    other = copy.deepcopy(cached.model)
    capture = KeyCapture(cached.spec.layers, 0)
    with capture.active(), torch.inference_mode():
        other.model.layers[0].self_attn.k_proj(torch.zeros(1, 3, 64))
        assert capture._latest[0] is None
        cached.model.model.layers[0].self_attn.k_proj(torch.zeros(1, 3, 64))
        assert capture._latest[0] is not None
