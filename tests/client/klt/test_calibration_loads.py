"""Whatever becomes of the calibration that KV was coded with, answers come."""

import dataclasses
import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from kvstore_bench.shaping import ShapedLink
from kvstore_client import KVStoreClient
from kvstore_client.engines.transformers import CachedModel
from kvstore_client.engines.transformers.spec import spec_of
from kvstore_client.new_chunk import NewChunk
from kvstore_codec.calibration import Calibration
from kvstore_codec.identity import CHUNK_TOKENS
from tests.client.conftest import ServedCluster
from tests.client.klt.calibrated import (
    GREEDY,
    MEDIUM,
    PROMPT,
    counted,
    publish,
    sharp_model,
    wait_for_calibration,
)
from tests.client.models import random_prompt, tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")


def loads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "kvstore-calibration"]


def slow_down(link: ShapedLink, client: KVStoreClient) -> None:
    """For the calibration alone: who the nodes are is asked before, not behind a download that fills the link."""
    spec = spec_of(tiny_model())
    assert not client.match(spec, client.chunk_ids(spec, range(CHUNK_TOKENS))).chunks
    link.set_bandwidth(2e6)


def test_the_engine_does_not_wait_for_a_calibration_and_has_it_later(
    stored: int, cluster: ServedCluster, new_client: Callable[..., KVStoreClient]
) -> None:
    model = sharp_model()
    with ShapedLink(cluster.address, bandwidth_bps=1e9) as link, new_client(link.address) as client:
        slow_down(link, client)
        cached = CachedModel(model, client, store=False)
        link.set_bandwidth(0.2e6)
        answer = cached.generate(PROMPT, **GREEDY)
        assert loads(), "the calibration was waited for"
        assert torch.equal(answer, model.generate(PROMPT, **GREEDY))
        assert cached.last_report.reused_tokens == 0
        assert counted(client, "calibration_loading") == 1
        assert len(loads()) <= 2  # one finds the model's newest, one loads it, however often it is asked for
        link.set_bandwidth(1e9)
        wait_for_calibration(cached)
        cached.generate(PROMPT, **GREEDY)
        assert cached.last_report.reused_tokens == 512


def test_an_exact_copy_is_taken_while_the_calibration_is_not_there(
    stored: int, cluster: ServedCluster, new_client: Callable[..., KVStoreClient]
) -> None:
    model = sharp_model()
    with new_client(encoding="exact-zstd") as client:
        CachedModel(model, client).generate(PROMPT, **GREEDY)
        client.store.flush()
    with ShapedLink(cluster.address, bandwidth_bps=1e9) as link, new_client(link.address) as client:
        slow_down(link, client)
        cached = CachedModel(model, client, store=False)
        assert torch.equal(cached.generate(PROMPT, **GREEDY), model.generate(PROMPT, **GREEDY))
        assert cached.last_report.reused_tokens == 512
        assert counted(client, "calibration_loading") == 0
        link.set_bandwidth(1e9)
        wait_for_calibration(cached)
        match = client.match(cached.spec, client.chunk_ids(cached.spec, PROMPT[0].tolist()))
        client.release(match)
        offered = [[variant.header.encoding.name for variant in chunk.variants] for chunk in match.chunks]
        assert offered == [[MEDIUM, "exact-zstd"]] * 2  # as `accept` has them, under the fixed policy
    cluster.check_nothing_is_held()


def test_without_a_calibration_nothing_is_stored_and_the_log_says_once_what_to_do(
    cluster: ServedCluster, new_client: Callable[..., KVStoreClient], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING), new_client() as client:
        cached = CachedModel(tiny_model(), client)
        for seed in range(3):
            cached.generate(random_prompt(600, seed=seed), **GREEDY)
            client.store.flush()
        assert counted(client, "store_no_calibration") == 3
    assert cluster.stored_chunks() == 0
    (warning,) = (record.getMessage() for record in caplog.records)
    assert f"kvstore calibrate --dtype float32 --publish {cluster.address}" in warning


def test_a_calibration_published_later_is_found(
    cluster: ServedCluster, calibration: Calibration, new_client: Callable[..., KVStoreClient]
) -> None:
    with new_client() as client:
        cached = CachedModel(sharp_model(), client)
        cached.generate(PROMPT, **GREEDY)
        client.store.flush()
        publish(cluster.address, calibration)
        cached.generate(PROMPT, **GREEDY)
        client.store.flush()
        cached.generate(PROMPT, **GREEDY)
        assert cached.last_report.reused_tokens == 512


def test_a_calibration_damaged_on_the_disk_is_got_again(
    stored: int, calibration: Calibration, new_client: Callable[..., KVStoreClient], tmp_path: Path
) -> None:
    file = tmp_path / "damaged" / "calibrations" / f"{calibration.digest.hex()}.kvcal"
    file.parent.mkdir(parents=True)
    data = calibration.to_bytes()
    file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with new_client(cache_dir=tmp_path / "damaged") as client:
        cached = CachedModel(sharp_model(), client)
        wait_for_calibration(cached)
        cached.generate(PROMPT, **GREEDY)
        assert cached.last_report.reused_tokens == 512
        assert counted(client, "calibration_cache_damaged") == 1
    assert file.read_bytes() == calibration.to_bytes()


def test_a_calibration_of_another_model_is_not_used(
    cluster: ServedCluster, calibration: Calibration, new_client: Callable[..., KVStoreClient]
) -> None:
    model = tiny_model(seed=3)
    with new_client() as client:
        cached = CachedModel(model, client)
        client.calibrations.publish(calibration.to_bytes(), cached.spec.digest)
        assert torch.equal(cached.generate(PROMPT, **GREEDY), model.generate(PROMPT, **GREEDY))
        client.store.flush()
        assert counted(client, "calibration_foreign") >= 1
        assert counted(client, "store_no_calibration") == 1
    assert cluster.stored_chunks() == 0


def test_chunks_of_another_calibration_are_replaced(
    stored: int, cluster: ServedCluster, calibration: Calibration, new_client: Callable[..., KVStoreClient]
) -> None:
    other = dataclasses.replace(calibration, provenance={"texts": ["others"]})
    publish(cluster.address, other)
    with new_client(accept=("exact-zstd",)) as writer:  # finds nothing, so it stores the same chunks again
        CachedModel(sharp_model(), writer).generate(PROMPT, **GREEDY)
        writer.store.flush()
    assert cluster.stored_chunks() == 2
    with new_client() as reader:
        cached = CachedModel(sharp_model(), reader)
        wait_for_calibration(cached)
        match = reader.match(cached.spec, reader.chunk_ids(cached.spec, PROMPT[0].tolist()))
        assert [chunk.header.calibration for chunk in match.chunks] == [other.digest] * 2
        reader.release(match)
        cached.generate(PROMPT, **GREEDY)
        assert cached.last_report.reused_tokens == 512
    cluster.check_nothing_is_held()


def test_bytes_that_are_no_calibration_are_read_once(
    cluster: ServedCluster, new_client: Callable[..., KVStoreClient]
) -> None:
    with new_client() as client:
        cached = CachedModel(tiny_model(), client)
        digest = client.calibrations.publish(b"no calibration", cached.spec.digest)
        for _ in range(3):
            assert client.prepare(cached.spec).result(60) is None
            assert client.ready_calibrations.klt(digest) is None
        assert counted(client, "calibration_unusable") == 1


def test_a_service_that_is_away_costs_nobody_anything(new_client: Callable[..., KVStoreClient]) -> None:
    model = tiny_model()
    with new_client("127.0.0.1:1", lookup_timeout_s=0.5) as client:
        cached = CachedModel(model, client)
        assert torch.equal(cached.generate(PROMPT, **GREEDY), model.generate(PROMPT, **GREEDY))
        client.store.flush()
        assert counted(client, "store_unreachable") == 1  # without its canary, nothing is handed to the store


def test_closing_in_the_middle_of_a_load_keeps_its_patience(
    stored: int, cluster: ServedCluster, new_client: Callable[..., KVStoreClient]
) -> None:
    spec = spec_of(sharp_model())
    kv = torch.randn(2, spec.layers, spec.kv_heads, CHUNK_TOKENS, spec.head_dim)
    with ShapedLink(cluster.address, bandwidth_bps=1e4) as link:
        client = new_client(link.address, close_timeout_s=0.3, calibration_timeout_s=60.0)
        new = [NewChunk(chunk_id, lambda: (kv[0], kv[1])) for chunk_id in client.chunk_ids(spec, range(600))]
        client.store.put(spec, new)  # and now the store waits for the calibration
        deadline = time.monotonic() + 30
        while not loads():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        started = time.monotonic()
        client.close()
        assert time.monotonic() - started < 30  # the load's own deadline is later
        assert counted(client, "store_dropped_at_close") == 1
        assert client.prepare(spec).result(1) is None
