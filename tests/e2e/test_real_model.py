"""SmolLM2 through a real cluster: same bits, same answers, and no failure that the model notices."""

import os
import signal
import threading
import time
from typing import Any

import pytest
import torch
from transformers import DynamicCache, PreTrainedModel

from kvstore_bench.demo.calibration import demo_calibration
from kvstore_bench.shaping import ShapedLink
from kvstore_client import connect
from kvstore_client.cluster_view import ClusterView
from kvstore_client.engines.transformers import CachedModel
from kvstore_client.settings import ClientSettings
from kvstore_service.calibration.publish import publish_calibration
from kvstore_service.embedded import EmbeddedCluster
from kvstore_service.models import load_smollm2
from tests.e2e.conftest import document_prompt

pytestmark = pytest.mark.slow
GREEDY = {"do_sample": False, "max_new_tokens": 16}
Loaded = tuple[PreTrainedModel, Any]


def test_reused_kv_is_bit_equal_and_so_is_the_answer(smollm2: Loaded, ray_cluster: EmbeddedCluster) -> None:
    model, tokenizer = smollm2
    first = document_prompt(tokenizer, 2200, "What is this about?")
    second = document_prompt(tokenizer, 2200, "Which types are immutable?")
    with connect(ray_cluster.address) as client:
        cached = CachedModel(model, client)
        written = cached.generate(first, return_dict_in_generate=True, **GREEDY)
        client.store.flush()
        in_memory = DynamicCache()
        reused = 2048
        for index, layer in enumerate(written.past_key_values.layers):
            in_memory.update(layer.keys[:, :, :reused], layer.values[:, :, :reused], index)
        expected = model.generate(second, past_key_values=in_memory, **GREEDY)
        got = cached.generate(second, return_dict_in_generate=True, **GREEDY)
        assert cached.last_report.reused_tokens == reused
        assert torch.equal(got.sequences, expected)
        for layer, original in zip(got.past_key_values.layers, written.past_key_values.layers, strict=True):
            assert torch.equal(layer.keys[:, :, :reused], original.keys[:, :, :reused])
            assert torch.equal(layer.values[:, :, :reused], original.values[:, :, :reused])
        assert torch.equal(got.sequences, model.generate(second, **GREEDY))
        cached.close()


def test_storage_actor_killed_in_the_middle_of_a_fetch(smollm2: Loaded, ray_cluster: EmbeddedCluster) -> None:
    model, tokenizer = smollm2
    prompt = document_prompt(tokenizer, 2400, "Who is it for?")
    expected = model.generate(prompt, **GREEDY)
    with connect(ray_cluster.address) as writer:
        cached = CachedModel(model, writer)
        cached.generate(prompt, **GREEDY)
        writer.store.flush()
        cached.close()

    (endpoint,) = (member.endpoint for member in _view(ray_cluster).membership().members)
    (pid,) = ray_cluster.storage_pids().values()
    with (
        ShapedLink(endpoint, bandwidth_bps=100e6) as link,
        connect(ray_cluster.address, routes={endpoint: link.address}, stall_timeout_s=1.0) as client,
    ):
        cached = CachedModel(model, client, store=False)

        def kill_in_mid_fetch() -> None:
            while link.from_target_bytes < 10_000_000:
                time.sleep(0.005)
            os.kill(pid, signal.SIGKILL)

        killer = threading.Thread(target=kill_in_mid_fetch)
        killer.start()
        assert torch.equal(cached.generate(prompt, **GREEDY), expected)
        killer.join()
        assert cached.last_report.reused_tokens < 2304
        assert client.metrics.snapshot()["chunks_missing"] > 0
        cached.close()

    # The actor comes back, empty, under the same name; a new worker stores and reuses again.
    patience = time.monotonic() + 60
    while ray_cluster.storage_pids().get("node-0") in (None, pid) and time.monotonic() < patience:
        time.sleep(0.2)
    while not any(m.endpoint != endpoint for m in _view(ray_cluster).membership().members):
        assert time.monotonic() < patience, "the restarted node did not join again"
        time.sleep(0.2)
    with connect(ray_cluster.address) as client:
        cached = CachedModel(model, client)
        for reused in (0, 2304):
            assert torch.equal(cached.generate(prompt, **GREEDY), expected)
            assert cached.last_report.reused_tokens == reused
            client.store.flush()
        cached.close()


def test_calibrated_kv_is_small_and_says_what_exact_kv_says(
    smollm2: Loaded, ray_cluster: EmbeddedCluster
) -> None:
    """In float32 a value has 32 bits; `high` keeps the answer."""
    model, tokenizer = smollm2
    calibration, _ = demo_calibration(*load_smollm2(torch.float32), print)
    publish_calibration(calibration, ray_cluster.address)
    prompt = document_prompt(tokenizer, 1700, "What are mutable objects?")
    first_logits, bytes_in = {}, {}
    for encoding in ("exact-zstd", "high-klt-pco"):
        with connect(ray_cluster.address, encoding=encoding, accept=(encoding,)) as client:
            cached = CachedModel(model, client)
            assert (client.prepare(cached.spec).result() is None) == (encoding == "exact-zstd")
            cached.generate(prompt, **GREEDY)
            client.store.flush()
            before = client.metrics.snapshot().get("bytes_in", 0)
            got = cached.generate(prompt, return_dict_in_generate=True, output_logits=True, **GREEDY)
            assert cached.last_report.reused_tokens == 1536
            bytes_in[encoding] = client.metrics.snapshot()["bytes_in"] - before
            first_logits[encoding] = got.logits[0][0].log_softmax(-1)
            cached.close()
    exact, lossy = first_logits["exact-zstd"], first_logits["high-klt-pco"]
    assert float((exact.exp() * (exact - lossy)).sum()) < 0.05
    assert bytes_in["high-klt-pco"] < bytes_in["exact-zstd"] / 10


def _view(cluster: EmbeddedCluster) -> ClusterView:
    return ClusterView(ClientSettings(address=cluster.address))
