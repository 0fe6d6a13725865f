"""A call that an exception of the engine's ends leaves what it computed: whole chunks, and nothing of half a pass."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import pytest
import torch

from kvstore_client import KVStoreClient, connect
from kvstore_client.engines.transformers import CachedModel
from tests.client.conftest import ServedCluster
from tests.client.models import random_prompt, tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")

GREEDY = {"max_new_tokens": 6, "do_sample": False}
PROMPT = random_prompt(700, seed=1)


class Gone:
    """A streamer whose client goes away when it is handed the `at`-th value; the first is the prompt."""

    def __init__(self, at: int, error: BaseException) -> None:
        self._left, self._error = at, error

    def put(self, value: torch.Tensor) -> None:
        self._left -= 1
        if not self._left:
            raise self._error

    def end(self) -> None: ...


@pytest.fixture
def client(cluster: ServedCluster) -> Iterator[KVStoreClient]:
    with connect(cluster.address) as client:
        yield client


def chunks_stored(client: KVStoreClient) -> int:
    client.store.flush()
    return client.metrics.snapshot().get("chunks_stored", 0)


@pytest.mark.parametrize("error", [BrokenPipeError("gone"), KeyboardInterrupt(), StopIteration("done")])
def test_an_aborted_call_leaves_its_prompt(
    client: KVStoreClient, cluster: ServedCluster, error: BaseException
) -> None:
    model = tiny_model("llama")
    cached = CachedModel(model, client)
    with pytest.raises(type(error)) as raised:
        cached.generate(PROMPT, streamer=Gone(3, error), **GREEDY)
    assert raised.value is error
    assert chunks_stored(client) == 2
    answer = cached.generate(PROMPT, **GREEDY)
    assert cached.last_report.reused_tokens == 512
    assert torch.equal(answer, model.generate(PROMPT, **GREEDY))
    cluster.check_nothing_is_held()


def test_aborted_behind_reused_text(client: KVStoreClient, cluster: ServedCluster) -> None:
    model = tiny_model("llama")
    cached = CachedModel(model, client)
    cached.generate(PROMPT[:, :300], **GREEDY)
    assert chunks_stored(client) == 1
    with pytest.raises(BrokenPipeError):
        cached.generate(PROMPT, streamer=Gone(2, BrokenPipeError()), **GREEDY)
    assert chunks_stored(client) == 2
    answer = cached.generate(PROMPT, **GREEDY)
    assert cached.last_report.reused_tokens == 512
    assert torch.equal(answer, model.generate(PROMPT, **GREEDY))
    cluster.check_nothing_is_held()
    assert len(client.buffers._free) == 1


@contextmanager
def device_lost(at: int) -> Iterator[None]:
    """Fails the `at`-th activation of an MLP in this thread; the tiny Llama computes five in each pass.

    By Python's own hook for profilers: nothing of torch or of the model is changed, which would be noticed."""
    left = at

    def see(_frame: FrameType, event: str, called: Any) -> None:
        nonlocal left
        if event == "c_call" and called is torch._C._nn.silu:
            left -= 1
            if not left:
                raise RuntimeError("the device is lost")

    sys.setprofile(see)
    try:
        yield
    finally:
        sys.setprofile(None)


@pytest.mark.parametrize("layer", [0, 3])
@pytest.mark.parametrize("passes", [1, 2])
def test_half_a_pass_leaves_nothing(client: KVStoreClient, layer: int, passes: int) -> None:
    model = tiny_model("llama")
    cached = CachedModel(model, client)
    with pytest.raises(RuntimeError, match="the device is lost"), device_lost(5 * (passes - 1) + layer + 1):
        cached.generate(PROMPT, **GREEDY)
    assert chunks_stored(client) == (0 if passes == 1 else 2)
    answer = cached.generate(PROMPT, **GREEDY)
    assert torch.equal(answer, model.generate(PROMPT, **GREEDY))


def test_before_the_first_pass_there_is_nothing(client: KVStoreClient) -> None:
    cached = CachedModel(tiny_model("llama"), client)
    with pytest.raises(BrokenPipeError):
        cached.generate(PROMPT, streamer=Gone(1, BrokenPipeError()), **GREEDY)
    assert chunks_stored(client) == 0


def test_aborted_segments(client: KVStoreClient, cluster: ServedCluster) -> None:
    cached = CachedModel(tiny_model("llama"), client)
    system, one, two, three, question = (random_prompt(n, seed=n) for n in (256, 512, 513, 514, 20))

    def ask(*documents: torch.Tensor, streamer: Gone | None = None) -> None:
        parts = (system, *documents, question)
        segments = [part.shape[1] for part in parts]
        cached.generate(torch.cat(parts, 1), segments=segments, streamer=streamer, **GREEDY)

    with pytest.raises(BrokenPipeError):
        ask(one, two, streamer=Gone(2, BrokenPipeError()))
    assert chunks_stored(client) == 5
    with pytest.raises(BrokenPipeError):
        ask(two, one, three, streamer=Gone(2, BrokenPipeError()))
    assert chunks_stored(client) == 7  # those of the third document are new
    ask(two, one, three)
    assert cached.last_report.approximate_tokens == 6 * 256
    assert chunks_stored(client) == 7
    cluster.check_nothing_is_held()
    assert len(client.buffers._free) == 1
