"""Whatever happens to the service, the answer is the same, in time, without an exception, and a counter says why."""

import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from kvstore_api.placement import Member, Membership
from kvstore_api.v1 import kvstore_pb2 as pb
from kvstore_bench.shaping import ShapedLink
from kvstore_client import KVStoreClient, connect
from kvstore_client.engines.transformers import CachedModel
from kvstore_codec.errors import ConfigurationError
from kvstore_service.grpc_server import GrpcServer, unary
from kvstore_service.listen import Address
from tests.client.changed_settings import changed
from tests.client.conftest import ServedCluster, served_cluster
from tests.client.models import random_prompt, tiny_model
from tests.damage import flip_bit

GREEDY = {"do_sample": False, "max_new_tokens": 4}
# A sound node of a busy machine may be silent for a moment, which must not be taken for a failure. The deadline of a
# fetch is so long that whoever waits for it exceeds PROMPT_S, and nobody else does.
PATIENCE = {"lookup_timeout_s": 1.5, "stall_timeout_s": 1.5, "fetch_timeout_s": 60.0, "retry_after_s": 0.0}
PROMPT_S = 30.0
LONG_DOCUMENT = pytest.mark.parametrize("worker", [16], indirect=True)
"""5.3 MB of KV: more than the sockets on the way can hold, so that a fetch is really cut short."""


@dataclass
class Worker:
    """A worker behind a link of its own, whose document is stored already."""

    cluster: ServedCluster
    client: KVStoreClient
    cached: CachedModel
    links: list[ShapedLink]
    chunks: int
    prompt: torch.Tensor
    expected: torch.Tensor

    def answer(self) -> torch.Tensor:
        started = time.monotonic()
        answer = self.cached.generate(self.prompt, **GREEDY)
        assert time.monotonic() - started < PROMPT_S
        return answer

    def counted(self, reason: str) -> int:
        return self.client.metrics.snapshot().get(f"miss_{reason}", 0)

    def while_fetching(self, action: Callable[[], object]) -> torch.Tensor:
        """Answer, doing `action` when a third of the document is on its way."""
        storage = self.links[1]
        storage.set_bandwidth(16e6)
        before = storage.from_target_bytes

        def act() -> None:
            deadline = time.monotonic() + PROMPT_S
            while storage.from_target_bytes < before + 500_000 and time.monotonic() < deadline:
                time.sleep(0.002)
            action()

        actor = threading.Thread(target=act)
        actor.start()
        try:
            return self.answer()
        finally:
            actor.join()


@pytest.fixture
def worker(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Worker]:
    chunks = getattr(request, "param", 5)
    model = tiny_model()
    prompt = random_prompt(256 * chunks + 20, seed=1)
    with served_cluster(tmp_path) as cluster, ExitStack() as links_open:
        with connect(cluster.address) as writer:
            CachedModel(tiny_model(), writer).generate(prompt, **GREEDY)
            writer.store.flush()
        assert cluster.stored_chunks() == chunks
        endpoints = [cluster.address, cluster.servers[0].address]
        links = [links_open.enter_context(ShapedLink(endpoint, bandwidth_bps=10e9)) for endpoint in endpoints]
        routes = {endpoint: link.address for endpoint, link in zip(endpoints, links, strict=True)}
        with connect(cluster.address, routes=routes, **PATIENCE) as client:
            cached = CachedModel(model, client, store=False)
            expected = model.generate(prompt, **GREEDY)
            yield Worker(cluster, client, cached, links, chunks, prompt, expected)


def test_the_worker_reuses_when_nothing_is_wrong(worker: Worker) -> None:
    assert torch.equal(worker.answer(), worker.expected)
    assert worker.cached.last_report.reused_tokens == 256 * worker.chunks
    worker.cluster.check_nothing_is_held()


def test_service_that_was_never_there() -> None:
    model, prompt = tiny_model(), random_prompt(600)
    with connect("127.0.0.1:1", **PATIENCE) as client:
        cached = CachedModel(model, client)
        assert torch.equal(cached.generate(prompt, **GREEDY), model.generate(prompt, **GREEDY))
        client.store.flush()
        assert client.metrics.snapshot()["miss_unreachable"] == 1
        assert client.metrics.snapshot()["miss_store_unreachable"] == 1


def test_storage_stopped_before_the_lookup(worker: Worker) -> None:
    worker.answer()
    worker.cluster.stop_storage()
    assert torch.equal(worker.answer(), worker.expected)
    assert worker.cached.last_report.reused_tokens == 0
    assert worker.counted("unreachable") == 1


def test_coordinator_stopped_after_the_membership_is_known(worker: Worker) -> None:
    worker.answer()
    worker.cluster.coordinator.stop(0)
    assert torch.equal(worker.answer(), worker.expected)
    assert worker.cached.last_report.reused_tokens == 256 * worker.chunks


@LONG_DOCUMENT
def test_storage_stopped_during_a_fetch(worker: Worker) -> None:
    assert torch.equal(worker.while_fetching(worker.cluster.stop_storage), worker.expected)
    assert worker.counted("unreachable") == 1
    assert worker.cached.last_report.reused_tokens < 256 * worker.chunks


@LONG_DOCUMENT
def test_link_goes_silent_during_a_fetch(worker: Worker) -> None:
    assert torch.equal(worker.while_fetching(worker.links[1].cut), worker.expected)
    assert worker.counted("stalled") == 1


def test_link_is_silent_before_the_lookup(worker: Worker) -> None:
    worker.answer()
    worker.links[1].cut()
    assert torch.equal(worker.answer(), worker.expected)
    assert worker.counted("unreachable") == 1


def test_link_is_silent_from_the_start(worker: Worker) -> None:
    for link in worker.links:
        link.cut()
    assert torch.equal(worker.answer(), worker.expected)
    assert worker.counted("unreachable") == 1


@LONG_DOCUMENT
def test_deadline_passes_on_a_slow_link(worker: Worker) -> None:
    worker.links[1].set_bandwidth(4e6)
    routes = worker.client.settings.transport.routes
    with connect(worker.cluster.address, routes=routes, fetch_timeout_s=0.4) as client:
        cached = CachedModel(tiny_model(), client, store=False)
        assert torch.equal(cached.generate(worker.prompt, **GREEDY), worker.expected)
        assert client.metrics.snapshot()["miss_timeout"] == 1
    worker.links[1].set_bandwidth(10e9)
    worker.cluster.check_nothing_is_held()


def test_chunks_deleted_between_lookup_and_read(worker: Worker) -> None:
    node = worker.cluster.nodes[0]
    ids = worker.client.chunk_ids(worker.cached.spec, worker.prompt[0].tolist())
    match = worker.client.match(worker.cached.spec, ids)
    node.delete(ids[3:4])
    buffers = worker.client.buffers.acquire(worker.cached.spec, match.tokens)
    report = worker.client.fetch(match, buffers, None).wait()
    assert (report.delivered, dict(report.missing)) == (3, {3: "gone"})
    assert torch.equal(worker.answer(), worker.expected)
    assert worker.cached.last_report.reused_tokens == 256 * 3
    worker.cluster.check_nothing_is_held()


@pytest.mark.parametrize("position", [0.3, 0.9])
def test_flipped_bits_are_found_and_recomputed(worker: Worker, position: float) -> None:
    """A bit of a stored frame turns over in the node's memory."""
    ids = worker.client.chunk_ids(worker.cached.spec, worker.prompt[0].tolist())
    with worker.cluster.nodes[0].open(ids[2], "exact-zstd") as reader:
        frames = reader.header.geometry.frame_count
        flip_bit(next(reader.pieces(int(position * frames), 1, 1 << 20))[0])
    assert torch.equal(worker.answer(), worker.expected)
    assert worker.cached.last_report.reused_tokens == 256 * 4
    assert worker.counted("checksum") == 1
    worker.cluster.check_nothing_is_held()


def test_a_streamer_sees_the_prompt_once_when_a_fetch_fails(worker: Worker) -> None:
    seen: list[torch.Tensor] = []

    class Recorder:
        def put(self, value: torch.Tensor) -> None:
            seen.append(value)

        def end(self) -> None:
            seen.append(torch.tensor([-1]))

    ids = worker.client.chunk_ids(worker.cached.spec, worker.prompt[0].tolist())
    with worker.cluster.nodes[0].open(ids[0], "exact-zstd") as reader:
        flip_bit(next(reader.pieces(0, 1, 1 << 20))[0])
    answer = worker.cached.generate(worker.prompt, streamer=Recorder(), **GREEDY)
    assert worker.counted("checksum") == 1
    assert torch.equal(seen[0], worker.prompt)
    assert torch.cat(seen[1:-1]).tolist() == answer[0, worker.prompt.shape[1] :].tolist()


@LONG_DOCUMENT
def test_a_cancelled_fetch_frees_everything(worker: Worker) -> None:
    ids = worker.client.chunk_ids(worker.cached.spec, worker.prompt[0].tolist())
    routes = dict(worker.client.settings.transport.routes)
    # What the last fetch left on the slow link delays the next lookup.
    with connect(
        worker.cluster.address, routes=routes, **PATIENCE | {"lookup_timeout_s": PROMPT_S}
    ) as client:
        for pause_s in (0.0, 0.01, 0.1, 0.3):
            worker.links[1].set_bandwidth(10e9)
            match = client.match(worker.cached.spec, ids)
            worker.links[1].set_bandwidth(0.5e6)  # at which the fetch would take more than a minute
            buffers = client.buffers.acquire(worker.cached.spec, match.tokens)
            fetch = client.fetch(match, buffers, None)
            time.sleep(pause_s)
            started = time.monotonic()
            report = fetch.cancel()
            assert time.monotonic() - started < PROMPT_S
            assert set(report.missing.values()) == {"cancelled"}
    worker.links[1].set_bandwidth(10e9)
    worker.cluster.check_nothing_is_held()
    stages = ("kvstore-receive", "kvstore-decode", "kvstore-restore")
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith(stages)]


def test_a_full_store_drops_new_chunks_and_keeps_the_answer(tmp_path: Path) -> None:
    model, prompt = tiny_model(), random_prompt(1500)
    with served_cluster(tmp_path, memory_bytes=1 << 16) as cluster, connect(cluster.address) as client:
        cached = CachedModel(model, client)
        assert torch.equal(cached.generate(prompt, **GREEDY), model.generate(prompt, **GREEDY))
        client.store.flush()
        assert client.metrics.snapshot()["miss_store_too_large"] == 5


def test_a_client_that_was_closed_prefills(worker: Worker) -> None:
    worker.client.close()
    worker.cached.store = True
    assert torch.equal(worker.answer(), worker.expected)


def test_a_client_that_was_closed_prefills_new_text_too(worker: Worker) -> None:
    worker.client.close()
    worker.cached.store = True
    prompt = random_prompt(600, seed=99)
    expected = worker.cached.model.generate(prompt, **GREEDY)
    assert torch.equal(worker.cached.generate(prompt, **GREEDY), expected)
    assert worker.counted("closed") == 1
    assert worker.counted("store_closed") == 1


@LONG_DOCUMENT
def test_an_owner_that_stalls_is_not_waited_for_again(worker: Worker) -> None:
    assert torch.equal(worker.while_fetching(worker.links[1].cut), worker.expected)
    patient = changed(worker.client.settings, retry_after_s=30.0)
    with KVStoreClient(patient) as client:
        cached = CachedModel(worker.cached.model, client, store=False)
        assert torch.equal(cached.generate(worker.prompt, **GREEDY), worker.expected)
        asked = client.metrics.snapshot()
        assert torch.equal(cached.generate(worker.prompt, **GREEDY), worker.expected)
        assert client.metrics.snapshot()["miss_paused"] == asked.get("miss_paused", 0) + 1


def test_closing_does_not_wait_for_a_silent_node(tmp_path: Path) -> None:
    with served_cluster(tmp_path) as cluster:
        endpoint = cluster.servers[0].address
        with ShapedLink(endpoint, bandwidth_bps=1e9) as link:
            link.cut()
            patience = {"close_timeout_s": 0.5, "put_stall_timeout_s": 60.0, "put_timeout_s": 120.0}
            client = connect(cluster.address, routes={endpoint: link.address}, **PATIENCE, **patience)
            cached = CachedModel(tiny_model(), client)
            for seed in range(3):
                cached.generate(random_prompt(300, seed=seed), **GREEDY)
            started = time.monotonic()
            client.close()
            assert time.monotonic() - started < PROMPT_S
            cached.close()


def test_a_coordinator_that_counts_anew_is_believed(tmp_path: Path) -> None:
    """It lost its catalogue and names other nodes under a lower epoch."""
    with served_cluster(tmp_path / "a") as old, connect(old.address, membership_ttl_s=0.01) as client:
        view = client._view
        assert view.membership().epoch >= 1
        view._membership = Membership(50, (Member("gone", "127.0.0.1:1"),))
        patience = time.monotonic() + 30
        while view.membership().epoch == 50 and time.monotonic() < patience:
            time.sleep(0.02)
        assert view.membership().members[0].endpoint == old.servers[0].address


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan"), float("inf")])
def test_members_without_a_usable_weight_own_nothing(weight: float) -> None:
    reply = pb.MembershipReply(
        epoch=1, members=[pb.Member(node_id="n", endpoint="127.0.0.1:1", weight=weight)]
    )
    server = GrpcServer(
        Address("127.0.0.1", 0),
        pb.DESCRIPTOR.services_by_name["Coordinator"].full_name,
        {"Membership": unary(lambda _request, _context: reply, pb.MembershipRequest)},
    )
    model, prompt = tiny_model(), random_prompt(300)
    with connect(server.address, **PATIENCE) as client:
        cached = CachedModel(model, client)
        assert torch.equal(cached.generate(prompt, **GREEDY), model.generate(prompt, **GREEDY))
        assert client.metrics.snapshot()["miss_unreachable"] == 1
    server.stop(0)


def test_an_address_that_is_none_is_refused_at_once() -> None:
    with pytest.raises(ConfigurationError, match="host:port"):
        connect("nonsense")


def test_a_setting_that_makes_no_sense_is_named() -> None:
    with pytest.raises(ConfigurationError, match="fetch_timeout_s"):
        connect(fetch_timeout_s=-1)
    with pytest.raises(ConfigurationError, match=r"encoding.*exact-zstd"):
        connect(encoding="exakt")
    with pytest.raises(ConfigurationError, match="tenant_salz"):
        connect(tenant_salz="a slip of the pen must not mean no salt")


@pytest.mark.parametrize("salt", [8675309, b"hush\xff", "hush\udcff"])
def test_the_salt_is_never_shown(salt: object) -> None:
    with pytest.raises(ConfigurationError) as caught:
        connect(tenant_salt=salt)
    shown = "".join(traceback.format_exception(caught.value))
    assert "hush" not in shown
    assert "8675309" not in shown.replace("connect(tenant_salt=8675309)", "")
