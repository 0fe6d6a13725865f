"""A vLLM worker compares the KV that its engine computes for the probe with the cluster's canary."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch

from kvstore_client.client import KVStoreClient, connect
from kvstore_client.engines.vllm.canary import EngineCanary, engine_probe
from kvstore_client.engines.vllm.generations import Generation
from kvstore_codec.canary.probe import TOKENS
from kvstore_codec.model_spec import KVDtype, ModelSpec
from kvstore_service.admin import ClusterAdmin
from tests.client.conftest import ServedCluster

pytestmark = pytest.mark.usefixtures("one_thread")

SPEC = ModelSpec("tiny", bytes(32), 4, 2, 16, KVDtype.FLOAT32, None, numerics=(("keys", "after RoPE"),))
BLOCKS = (7, 3)

Connect = Callable[[], KVStoreClient]


class Engine:
    """Memory of an engine that has computed the probe. Its layers from the third on are scaled."""

    def __init__(self, scale: float = 1.0) -> None:
        self.kv = torch.randn(4, 2, 2, TOKENS, 16, generator=torch.Generator().manual_seed(0))
        self.kv[2:] *= scale

    def read_layer(
        self, layer: int, block_ids: Sequence[int], tokens: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        assert (tuple(block_ids), tokens) == (BLOCKS, TOKENS)
        keys, values = self.kv[layer]
        return keys, values


@pytest.fixture
def client(cluster: ServedCluster, tmp_path: Path) -> Iterator[Connect]:
    """Makes clients, one for each worker."""
    with ExitStack() as clients:

        def connected() -> KVStoreClient:
            made = connect(cluster.address, cache_dir=tmp_path / "cache", membership_ttl_s=0.1)
            return clients.enter_context(made)

        yield connected


def worker(client: KVStoreClient, engine: Engine, *, is_required: bool = False) -> EngineCanary:
    probe = engine_probe(512)
    return EngineCanary(client, SPEC, probe, engine.read_layer, device="cpu", is_required=is_required)


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def result(canary: EngineCanary) -> str | None:
    canary.computed(BLOCKS)
    until(lambda: canary.refusal(0) != "canary_pending")
    return canary.refusal(0)


def test_a_worker_that_computes_other_kv_is_refused(client: Connect) -> None:
    assert result(worker(client(), Engine())) is None
    assert result(worker(client(), Engine())) is None
    wrong = worker(client(), Engine(1.001))
    assert result(wrong) == "canary_differs"
    assert "computes other KV here" in wrong.why("canary_differs")


def test_before_the_probe_kv_is_shared_unless_the_comparison_is_required(client: Connect) -> None:
    assert worker(client(), Engine()).refusal(0) is None
    strict = worker(client(), Engine(), is_required=True)
    assert strict.refusal(0) == "canary_pending"
    assert "send it the probe" in strict.why("canary_pending")
    assert result(strict) is None


def test_the_comparison_is_made_when_the_coordinator_can_be_reached(
    client: Connect, cluster: ServedCluster, tmp_path: Path
) -> None:
    with connect("127.0.0.1:9", cache_dir=tmp_path / "cache", lookup_timeout_s=0.2) as lost:
        assert result(worker(lost, Engine())) == "unreachable"


def test_a_replaced_canary_is_made_again_under_another_generation(
    client: Connect, cluster: ServedCluster
) -> None:
    """The worker that made the canary was wrong. After the replacement the right one makes it."""
    clients = [client() for _ in range(3)]
    wrong, right = worker(clients[0], Engine(2.0)), worker(clients[1], Engine())
    generation = Generation(clients[2], SPEC)
    assert result(wrong) is None
    assert result(right) == "canary_differs"
    with ClusterAdmin(cluster.address) as admin:
        admin.replace_canary(SPEC.digest)

    def is_replaced() -> bool:
        for one in clients:  # as each lookup does
            one.canaries.get(SPEC)
        return generation.current() == 1

    until(is_replaced)
    until(lambda: right.refusal(1) is None)
    assert right.refusal(0) == "canary_pending", "chunks named before the replacement are not shared"
    until(lambda: wrong.refusal(1) == "canary_differs")
