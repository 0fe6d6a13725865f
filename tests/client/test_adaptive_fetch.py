"""A planned fetch: the engine computes one end of a prompt while the other arrives, and the answer stays the same."""

import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from kvstore_bench.link.clients import connect_policy
from kvstore_bench.shaping import ShapedLink
from kvstore_client import connect
from kvstore_client.engines.transformers import CachedModel
from kvstore_client.engines.transformers.profile import machine_of
from kvstore_client.engines.transformers.spec import spec_of
from kvstore_client.planning import CodecCost, PrefillCost, Profile, ProfileStore, profile_key
from tests.client.conftest import ServedCluster, served_cluster
from tests.client.models import random_prompt, tiny_model

GREEDY = {"do_sample": False, "max_new_tokens": 4}
CHUNKS = 12
STORED = "exact-zstd,exact-raw"
FAST_BPS, SLOW_BPS = 1e9, 16e6


@dataclass
class Setup:
    cluster: ServedCluster
    link: ShapedLink
    prompt: torch.Tensor
    expected: torch.Tensor
    settings: dict[str, Any]

    def set_prefill(self, seconds_per_token: float) -> None:
        """Have the profile say that computing costs so much: a model this small costs next to nothing."""
        model = tiny_model()
        costs = dict.fromkeys(STORED.split(","), CodecCost(2e-6, 1e-6))
        store = ProfileStore(self.settings["cache_dir"])
        profile = Profile(costs, PrefillCost(0.0, seconds_per_token, 0.0), 0.0, 1)
        store.save(profile_key(spec_of(model), machine_of(model)), profile)

    def answered_alike(self, cached: CachedModel) -> None:
        assert torch.equal(cached.generate(self.prompt, **GREEDY), self.expected)


@pytest.fixture
def setup(tmp_path: Path, one_thread: None) -> Iterator[Setup]:
    model = tiny_model()
    prompt = random_prompt(256 * CHUNKS + 20, seed=1)
    with served_cluster(tmp_path, bulk=True) as cluster, ExitStack() as opened:
        with connect(cluster.address, encoding=STORED) as writer:
            CachedModel(tiny_model(), writer).generate(prompt, **GREEDY)
            writer.store.flush()
        link = opened.enter_context(ShapedLink(cluster.bulk[0].address, bandwidth_bps=FAST_BPS))
        settings = {
            "address": cluster.address,
            "routes": {cluster.bulk[0].address: link.address},
            "fetch_policy": "adaptive",
            "encoding": STORED,
            "cache_dir": tmp_path / "cache",
        }
        yield Setup(cluster, link, prompt, model.generate(prompt, **GREEDY), settings)


def test_a_fast_link_brings_everything(setup: Setup) -> None:
    setup.set_prefill(2e-3)
    with connect(**setup.settings) as client:
        cached = CachedModel(tiny_model(), client)
        setup.answered_alike(cached)
        report = cached.last_report.fetch
        assert report is not None
        assert (report.fetched, report.computed, report.missing) == (CHUNKS, 0, {})
        assert cached.last_report.reused_tokens == CHUNKS * 256
        assert client.metrics.snapshot()["chunks_planned_fetch"] == CHUNKS
        setup.cluster.check_nothing_is_held()


def test_a_slow_link_is_met_half_way(setup: Setup) -> None:
    """Each chunk takes .15 s on the link, and .1 s as the profile has it; after the first fetch the link is known."""
    setup.set_prefill(0.1 / 256)
    setup.link.set_bandwidth(SLOW_BPS)
    with connect(**setup.settings) as client:
        cached = CachedModel(tiny_model(), client, store=False)
        setup.answered_alike(cached)
        setup.answered_alike(cached)
        report = cached.last_report.fetch
        assert report is not None
        assert 0 < report.fetched < CHUNKS
        assert report.fetched + report.computed == CHUNKS
        assert report.complete
        assert cached.last_report.reused_tokens == report.fetched * 256
        plan = cached.last_report.timeline.marks[0]
        assert plan.name == "plan"
        assert plan.facts["bandwidth_Bps"] == pytest.approx(SLOW_BPS / 8, rel=0.3)
        setup.cluster.check_nothing_is_held()


def test_what_is_sooner_computed_is_not_fetched(setup: Setup) -> None:
    setup.set_prefill(1e-6)
    setup.link.set_bandwidth(SLOW_BPS)
    with connect(**setup.settings) as client:
        cached = CachedModel(tiny_model(), client)
        for _ in range(2):
            setup.answered_alike(cached)
        assert cached.last_report.reused_tokens == 0
        client.store.flush()
        assert "chunks_stored" not in client.metrics.snapshot()  # they are there already
    setup.cluster.check_nothing_is_held()


def test_a_link_that_slows_down_has_the_rest_computed(setup: Setup) -> None:
    setup.set_prefill(0.05 / 256)
    setup.link.set_bandwidth(100e6)
    with connect(**setup.settings, fetch_timeout_s=120.0) as client:
        cached = CachedModel(tiny_model(), client, store=False)
        setup.answered_alike(cached)
        before = setup.link.from_target_bytes

        def slow_down() -> None:
            while setup.link.from_target_bytes < before + 600_000:
                time.sleep(0.001)
            setup.link.set_bandwidth(0.25e6)

        slowing = threading.Thread(target=slow_down)
        slowing.start()
        started = time.monotonic()
        setup.answered_alike(cached)
        slowing.join()
        # What is left would take 80 s.
        assert time.monotonic() - started < 40
        report = cached.last_report.fetch
        assert report is not None
        assert report.replans >= 1
        assert report.computed >= 1
        assert "replan" in {mark.name for mark in cached.last_report.timeline.marks}
        setup.cluster.check_nothing_is_held()


@pytest.mark.parametrize("policy", ["kvfetcher", "fixed"])
def test_other_policies_compute_nothing(setup: Setup, policy: str) -> None:
    setup.set_prefill(1e-6)
    with connect(**setup.settings | {"fetch_policy": policy}) as client:
        cached = CachedModel(tiny_model(), client)
        setup.answered_alike(cached)
        assert cached.last_report.reused_tokens == CHUNKS * 256


def test_the_stages_may_work_one_after_the_other(setup: Setup) -> None:
    setup.set_prefill(2e-3)
    with connect_policy(setup.cluster.address, setup.settings | {"pipelined": False}) as client:
        assert not client.settings.fetch.replan
        cached = CachedModel(tiny_model(), client)
        setup.answered_alike(cached)
        spans = cached.last_report.timeline.spans
        ends = {stage: max(s.end_s for s in spans if s.stage == stage) for stage in ("receive", "decode")}
        assert min(s.start_s for s in spans if s.stage == "decode") >= ends["receive"]
        assert min(s.start_s for s in spans if s.stage == "restore") >= ends["decode"]


def test_a_link_too_slow_for_one_read_brings_it_all_the_same(setup: Setup) -> None:
    """A read is never broken off because it takes long, or it would be asked for again and again."""
    setup.set_prefill(10.0)
    setup.link.set_bandwidth(1e6)  # 110 KB a read: .9 s
    with connect(**setup.settings | {"encoding": "exact-raw"}, accept=("exact-raw",)) as client:
        cached = CachedModel(tiny_model(), client, store=False)
        prompt = setup.prompt[:, : 256 + 20]
        assert torch.equal(cached.generate(prompt, **GREEDY), tiny_model().generate(prompt, **GREEDY))
        report = cached.last_report.fetch
        assert report is not None
        assert report.complete
        assert report.received_bytes < 500_000
