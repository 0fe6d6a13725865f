"""What vLLM's own server shows of the connector's work: its Prometheus endpoint, its log, and its KV events."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import msgspec
import pytest
import zmq
from vllm.distributed.kv_events import BlockStored, KVEventBatch
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1

from kvstore_client.engines.vllm.probe import send_probe
from tests.vllm.kept_canaries import models
from tests.vllm.models import saved_model
from tests.vllm.processes import StoreProcess, free_port, prompt, until
from tests.vllm.server_process import ServerProcess, save_tokenizer

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]


@dataclass
class Served:
    store: StoreProcess
    server: ServerProcess
    subscription: zmq.Socket
    events: dict[tuple[int, ...], BlockStored] = field(default_factory=dict)

    def published(self, chunks: Sequence[list[int]]) -> list[BlockStored]:
        """The events of these chunks of tokens, if all have been published."""
        while self.subscription.poll(0):
            _, _, payload = self.subscription.recv_multipart()
            for event in msgspec.msgpack.decode(payload, type=KVEventBatch).events:
                self.events[tuple(event.token_ids)] = event
        found = [self.events.get(tuple(tokens)) for tokens in chunks]
        return [] if None in found else found


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder, port = tmp_path_factory.mktemp("served"), free_port()
    model = saved_model(folder / "model", seed=0)
    save_tokenizer(model, 512)
    store = StoreProcess(folder, port)
    connector = {"address": f"127.0.0.1:{port}", "cache_dir": str(folder / "cache")}
    endpoint = f"ipc://{folder}/events"
    events = {"enable_kv_cache_events": True, "publisher": "zmq", "endpoint": endpoint}
    options = ("--no-enable-prefix-caching", "--block-size", "128", "--kv-events-config", json.dumps(events))
    server = ServerProcess(folder, model, connector, *options)
    with zmq.Context() as context, context.socket(zmq.SUB) as subscription:
        subscription.connect(endpoint)
        subscription.subscribe("")
        yield Served(store, server, subscription)
    for process in (server, store):
        process.close()


def test_a_scrape_finds_what_the_engine_stored_and_loaded(served: Served) -> None:
    tokens = prompt(1300, seed=1)
    cold = served.server.complete(tokens)
    until(lambda: served.store.stats()["chunks"] == 5)
    hit = served.server.complete(tokens)
    assert hit["choices"][0]["text"] == cold["choices"][0]["text"]
    worker = "{half=worker}"
    until(lambda: served.server.metrics().get(f"kvstore_vllm_loaded_tokens_total{worker}") == 1280)
    found = served.server.metrics()
    assert found[f"kvstore_vllm_stored_chunks_total{worker}"] == 5
    assert found["kvstore_vllm_chunks_total{half=worker,result=delivered}"] == 5
    assert found[f"kvstore_vllm_load_seconds_count{worker}"] == 1
    kv_bytes = 1280 * 4 * 2 * 2 * 32 * 4
    for direction in ("in", "out"):
        moved = found[f"kvstore_vllm_bytes_total{{direction={direction},half=worker}}"]
        assert 0.5 * kv_bytes < moved < 1.1 * kv_bytes
    assert found["vllm:external_prefix_cache_hits_total{}"] == 1280
    if hasattr(KVConnectorBase_V1, "get_external_cache_hit_sources"):
        source = "vllm:prompt_tokens_cached_by_source_total{source="
        by_source = {name: tokens for name, tokens in found.items() if name.startswith(source) and tokens}
        assert by_source == {f"{source}external_unspecified}}": 1280}
    assert not [name for name in found if name.startswith("kvstore_client_")], "the API server has no client"


def test_what_is_stored_is_published(served: Served) -> None:
    """By the hashes that the engine gives its own blocks, chained from the text's first block on."""
    tokens = prompt(600, seed=3)
    chunks = served.store.stats()["chunks"]
    served.server.complete(tokens)
    until(lambda: served.store.stats()["chunks"] == chunks + 2)

    def published() -> list[BlockStored]:
        served.server.complete(prompt(20, seed=4))  # events travel with the engine's steps
        return served.published([tokens[:256], tokens[256:512]])

    until(lambda: bool(published()))
    first, second = published()
    assert (first.parent_block_hash, second.parent_block_hash) == (None, first.block_hashes[-1])
    assert {len(set(event.block_hashes)) for event in (first, second)} == {2}
    assert (first.medium, first.locality, first.block_size) == ("STORAGE", "REMOTE", 128)


def test_the_probe_that_a_server_is_sent_is_compared(served: Served) -> None:
    send_probe(served.server.url)
    until(lambda: len(models(served.store)) == 1)
    (kept,) = models(served.store)
    assert "vllm" in kept.origin.software
    with pytest.raises(OSError, match="refused"):
        send_probe(f"http://127.0.0.1:{free_port()}")


def test_misses_are_shown_with_their_reason_and_logged(served: Served) -> None:
    served.store.kill()
    served.server.complete(prompt(600, seed=2))

    def missed() -> float:
        found = served.server.metrics()
        return sum(value for name, value in found.items() if name.startswith("kvstore_vllm_misses_total"))

    until(lambda: missed() > 0)
    until(lambda: "KV Transfer metrics: loads=" in served.server.log())
    until(lambda: "miss_" in served.server.log())
