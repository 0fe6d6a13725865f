"""Counts of the connector's halves on their way to vLLM's log line and Prometheus."""

import inspect
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from prometheus_client import REGISTRY, Counter, Gauge, Histogram
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorStats

from kvstore_client.contiguous.report import ReprefillReport
from kvstore_client.engines.vllm.connector import KVStoreConnector
from kvstore_client.engines.vllm.families import NOT_SHOWN, family_of
from kvstore_client.engines.vllm.load_log import LoadLog
from kvstore_client.engines.vllm.loads import LoadedBlocks
from kvstore_client.engines.vllm.metadata import LoadRequest
from kvstore_client.engines.vllm.prometheus import ReusePromMetrics
from kvstore_client.engines.vllm.stats import SCHEDULER, WORKER, StatsSource
from kvstore_client.metrics import ClientMetrics
from kvstore_client.miss_reason import MissReason
from kvstore_client.timeline import Timeline
from kvstore_codec.encoding import Encoding

pytestmark = pytest.mark.vllm

RAW = Encoding.parse("exact-raw")


def stats_after(metrics: ClientMetrics, half: str = WORKER) -> tuple[StatsSource, KVConnectorStats]:
    source = StatsSource(half, metrics)
    stats = source.take()
    assert stats is not None
    return source, stats


def test_each_count_is_reported_once() -> None:
    metrics = ClientMetrics()
    metrics.missed(MissReason.GONE, chunks=2)
    source, stats = stats_after(metrics)
    assert stats.counts() == {WORKER: {"miss_gone": 1, "chunks_missing": 2}}
    assert source.take() is None
    metrics.missed(MissReason.GONE)
    again = source.take([0.5])
    assert again is not None
    assert again.counts() == {WORKER: {"miss_gone": 1}}
    assert again.seconds() == {WORKER: {"load": [0.5]}}


def test_counts_are_copied_only_when_something_was_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM asks each half after every step, and most steps count nothing."""
    metrics = ClientMetrics()
    metrics.missed(MissReason.GONE)
    source, _ = stats_after(metrics)
    copies: list[str] = []
    snapshot = metrics.snapshot
    monkeypatch.setattr(metrics, "snapshot", lambda: copies.append("copy") or snapshot())
    assert source.take() is None
    assert copies == []
    metrics.predicted(0.5, 0.5)
    told = source.take()
    assert told is not None
    assert told.seconds() == {WORKER: {"predicted_fetch": [0.5]}}
    assert copies == ["copy"]


def test_both_halves_arrive_in_another_process_as_they_were_counted() -> None:
    metrics = ClientMetrics()
    metrics.missed(MissReason.GONE)
    metrics.prompt(reused_tokens=512, computed_tokens=0)
    _, worker = stats_after(metrics)
    _, scheduler = stats_after(metrics, SCHEDULER)
    both = worker.aggregate(scheduler).aggregate(StatsSource(WORKER, metrics).take([0.25]))
    arrived = msgspec.msgpack.decode(msgspec.msgpack.encode(both.to_dict()))
    rebuilt = KVStoreConnector.build_kv_connector_stats(arrived)
    assert rebuilt.counts() == {
        WORKER: {"miss_gone": 2, "tokens_reused": 1024},
        SCHEDULER: {"miss_gone": 1, "tokens_reused": 512},
    }
    told = rebuilt.reduce()
    assert (told["loads"], told["mean load (ms)"], told["loaded tokens"]) == (1, 250.0, 1536)
    assert told["miss_gone"] == 3
    assert KVStoreConnector.build_kv_connector_stats().is_empty()
    rebuilt.reset()
    assert rebuilt.is_empty()


def everything_counted() -> ClientMetrics:
    """Each method called once; a new one has to be added here, and to the families."""
    metrics = ClientMetrics()
    calls: dict[str, Any] = {
        "requested": {"tokens": 1},
        "matched": {"exact": 1, "approximate": 1, "tokens": 1},
        "delivered": {"chunks": 1},
        "missed": {"reason": MissReason.GONE, "chunks": 1},
        "received": {"size_bytes": 1},
        "fetched_bytes": {"by_encoding": {RAW: 1}},
        "stored": {"chunks": 1, "size_bytes": 1, "encoding": RAW},
        "under_replicated": {"chunks": 1},
        "failed_over": {"reason": "gone"},
        "fetched": {"timeline": Timeline(), "fetch_s": 1.0},
        "predicted": {"fetch_s": 1.0, "took_s": 1.0},
        "planned": {"fetched": 1, "computed": 1},
        "replanned": {},
        "waiting_for_kv": {"change": 1},
        "guarded": {"frames": {"finer": 1}},
        "reprefilled": {"report": ReprefillReport(frames_needed=2, frames_cached=1, frames_read=1)},
        "prompt": {"reused_tokens": 1, "computed_tokens": 1},
        "paged": {"operation": "get", "ok": 1, "reasons": {}},
    }
    methods = {name for name, _ in inspect.getmembers(metrics, inspect.ismethod) if name[0] != "_"}
    assert methods == {*calls, "snapshot", "take_predictions"}
    for name, arguments in calls.items():
        getattr(metrics, name)(**arguments)
    return metrics


def test_every_count_of_a_client_is_shown_or_left_out_on_purpose() -> None:
    for name in everything_counted().snapshot():
        assert (family_of(name) is None) == name.startswith(NOT_SHOWN), name


@pytest.fixture
def shown() -> Iterator[ReusePromMetrics]:
    kinds = {Counter: Counter, Gauge: Gauge, Histogram: Histogram}
    config: Any = SimpleNamespace(kv_transfer_config=None)
    for _ in range(2):  # the second engine of a process finds the first one's counters
        made = KVStoreConnector.build_prom_metrics(
            config, kinds, ["model_name", "engine"], {0: ["tiny", "0"], 1: ["tiny", "1"]}
        )
    return made


def sample(name: str, **labels: str) -> float:
    return REGISTRY.get_sample_value(f"kvstore_vllm_{name}", {"model_name": "tiny", **labels}) or 0


def test_prometheus_shows_each_engine_and_half(shown: ReusePromMetrics) -> None:
    _, stats = stats_after(everything_counted())
    stats.aggregate(StatsSource(WORKER, ClientMetrics()).take([0.02]))
    labels = {"engine": "1", "half": WORKER}
    before = sample("misses_total", reason="gone", **labels)
    loads, predicted = (sample(f"{name}_seconds_count", **labels) for name in ("load", "predicted_fetch"))
    shown.observe(stats.to_dict(), 1)
    assert sample("misses_total", reason="gone", **labels) == before + 1
    assert sample("load_seconds_count", **labels) == loads + 1
    assert sample("predicted_fetch_seconds_count", **labels) == predicted + 1
    for name in ("loaded_tokens_total", "matched_tokens_total", "stored_chunks_total", "replans_total"):
        assert sample(name, **labels) >= 1
    assert sample("bytes_total", direction="in", **labels) >= 1
    assert not sample("misses_total", reason="gone", engine="0", half=WORKER)


def test_loads_are_timed_and_their_tokens_counted() -> None:
    metrics = ClientMetrics()
    log = LoadLog(metrics, 128)
    for name, blocks in {"whole": (1, 2, 3, 4), "part": (1, 5, 6, 7), "gone": (8, 9, 10, 11)}.items():
        log.began(LoadRequest(name, (), 128, 512, blocks))
    log.cancelled({"gone", "other"})
    log.ended(LoadedBlocks(frozenset({"whole", "part"}), frozenset({6, 7})))
    log.ended(LoadedBlocks(frozenset({"gone"})))
    assert metrics.snapshot()["tokens_reused"] == 384 + 128
    assert len(log.take()) == 2
    assert not log.take()
