"""Which share of reused text is computed again when a request does not say: of real models over real nodes."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from kvstore_client import connect
from kvstore_client.engines.transformers import CachedModel
from kvstore_client.match import Match
from kvstore_client.recompute import Recompute
from kvstore_client.recompute.tuned import TunedRatios
from kvstore_client.recompute.tuning import Tuned
from kvstore_client.reuse.blend.ratio import Ratios
from kvstore_client.reuse.blend.worth import MOST_COMPUTED
from kvstore_codec.model_spec import ModelSpec
from tests.client.conftest import ServedCluster, served_cluster
from tests.client.models import random_prompt, tiny_model

SYSTEM, DOCUMENTS, QUESTION = 64, (512, 256, 512), 32
SEGMENTS = [SYSTEM, *DOCUMENTS, QUESTION]
REUSED = sum(DOCUMENTS[1:])
"""In another context: the first document is exact."""
KNOWS_BEFOREHAND: dict[str, Any] = {"recompute_selector": "first_k", "recompute_drift": False}


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[ServedCluster]:
    with served_cluster(tmp_path, disk_bytes=64 << 20, experiments=True) as served:
        yield served


@pytest.fixture
def prompt(cluster: ServedCluster) -> torch.Tensor:
    """`[1, tokens]`; each of its documents is stored, of a request of its own."""
    ids = random_prompt(sum(SEGMENTS))
    system, *documents, question = torch.split(ids, SEGMENTS, dim=1)
    with worker(cluster) as cached:
        for document in documents:
            cached.generate(
                torch.cat((system, document, question), 1),
                segments=[SYSTEM, document.shape[1], QUESTION],
                max_new_tokens=1,
            )
    assert cluster.stored_chunks() == 5
    return ids


@contextmanager
def worker(cluster: ServedCluster, **settings: Any) -> Iterator[CachedModel]:
    """One that reuses always: a model this small is sooner with everything computed."""
    with connect(cluster.address, fetch_policy="fixed", **settings) as client:
        cached = CachedModel(tiny_model(), client)
        yield cached
        cached.close()


def recomputed(cached: CachedModel, ids: torch.Tensor, recompute: Recompute | None = None) -> int:
    cached.generate(ids, segments=SEGMENTS, recompute=recompute, max_new_tokens=1)
    report = cached.last_report
    assert (report.approximate_tokens, report.fetch is not None) == (REUSED, True)
    return report.recomputed_tokens


def to_disk(cluster: ServedCluster) -> None:
    for node in cluster.nodes:
        node.limit_disk(1e12)
        while node.stats().gauges["memory_chunks"]:
            node.maintain()


def tune(cache_dir: Path, spec: ModelSpec, **ratios: float) -> None:
    for tier, ratio in ratios.items():
        TunedRatios(cache_dir).save(spec.digest, tier, Tuned(ratio, ()))


def match_of(cached: CachedModel, ids: torch.Tensor) -> Match:
    placed = cached.client.segment_chunks(cached.spec, ids[0].tolist(), SEGMENTS)
    match = cached.client.match_segments(cached.spec, placed)
    cached.client.release(match)
    return match


def test_the_floor_where_nothing_was_tuned(
    cluster: ServedCluster, prompt: torch.Tensor, tmp_path: Path
) -> None:
    with worker(cluster, cache_dir=tmp_path) as cached:
        assert recomputed(cached, prompt) == int(0.15 * REUSED)
    with worker(cluster, cache_dir=tmp_path, recompute_floor=0.25) as cached:
        assert recomputed(cached, prompt) == int(0.25 * REUSED)


def test_what_was_tuned_for_where_the_text_is_stored(
    cluster: ServedCluster, prompt: torch.Tensor, tmp_path: Path
) -> None:
    with worker(cluster, cache_dir=tmp_path) as cached:
        tune(tmp_path, cached.spec, dram=0.25, disk=0.375, ssd=0.5, hdd=0.4375)
        assert not any(chunk.on_disk for chunk in match_of(cached, prompt).chunks)
        assert recomputed(cached, prompt) == 0.25 * REUSED
        to_disk(cluster)
        assert all(chunk.on_disk for chunk in match_of(cached, prompt).chunks)
        assert recomputed(cached, prompt) == 0.375 * REUSED
    with worker(cluster, cache_dir=tmp_path, disk_tier="hdd") as cached:
        assert recomputed(cached, prompt) == 0.4375 * REUSED
    with worker(cluster, cache_dir=tmp_path, disk_tier="tape") as cached:
        assert recomputed(cached, prompt) == int(0.15 * REUSED)
    with worker(cluster, cache_dir=tmp_path / "other") as cached:
        tune(tmp_path / "other", cached.spec, dram=0.25, ssd=0.5)
        assert recomputed(cached, prompt) == 0.5 * REUSED


def test_never_less_than_the_floor_was_tuned(
    cluster: ServedCluster, prompt: torch.Tensor, tmp_path: Path
) -> None:
    with worker(cluster, cache_dir=tmp_path, recompute_floor=0.5) as cached:
        tune(tmp_path, cached.spec, dram=0.25)
        assert recomputed(cached, prompt) == 0.5 * REUSED


def test_the_caller_and_the_settings_know_better(
    cluster: ServedCluster, prompt: torch.Tensor, tmp_path: Path
) -> None:
    with worker(cluster, cache_dir=tmp_path, recompute_ratio=0) as cached:
        tune(tmp_path, cached.spec, dram=0.25)
        assert recomputed(cached, prompt) == 0
        assert recomputed(cached, prompt, Recompute(ratio=0.5)) == 0.5 * REUSED
        assert recomputed(cached, prompt, Recompute(ratio=0.0)) == 0


def test_half_of_the_bytes_on_disk_are_not_most_of_them(
    cluster: ServedCluster, prompt: torch.Tensor, tmp_path: Path
) -> None:
    with worker(cluster, cache_dir=tmp_path) as cached:
        tune(tmp_path, cached.spec, dram=0.25, disk=0.5)
        in_memory = match_of(cached, prompt)
        to_disk(cluster)
        on_disk = match_of(cached, prompt)
        ratios = Ratios(cached.client.settings, cached.client.links)

        def ratio(first_on_disk: int) -> float:
            chunks = (*in_memory.chunks[:first_on_disk], *on_disk.chunks[first_on_disk:])
            return ratios.recompute(cached.spec.digest, Match(chunks)).ratio

        assert [ratio(first) for first in (0, 1, 2, 3, 5)] == [0.5, 0.5, 0.5, 0.25, 0.25]
        assert ratios.recompute(cached.spec.digest, Match()).ratio == 0.25


def test_a_file_of_ratios_is_read_once(cluster: ServedCluster, prompt: torch.Tensor, tmp_path: Path) -> None:
    with worker(cluster, cache_dir=tmp_path) as cached:
        tune(tmp_path, cached.spec, dram=0.25)
        assert recomputed(cached, prompt) == 0.25 * REUSED
        tune(tmp_path, cached.spec, dram=0.5)
        assert recomputed(cached, prompt) == 0.25 * REUSED


def test_the_ratio_follows_the_link_where_computed_tokens_do_not_travel(
    cluster: ServedCluster, prompt: torch.Tensor, tmp_path: Path
) -> None:
    with worker(cluster, cache_dir=tmp_path, **KNOWS_BEFOREHAND) as cached:
        match = match_of(cached, prompt)
        token_bytes = sum(chunk.body_bytes for chunk in match.chunks) / match.tokens
        links, endpoint = cached.client.links, match.chunks[0].member.endpoint
        ratios = Ratios(cached.client.settings, links)

        def after(token_s: float, requests: int = 60) -> list[float]:
            """Ratios of so many requests over a link that takes so long for a token; computing one takes a ms."""
            found = []
            for _ in range(requests):
                ratios.computed(100, 0.1)
                links.observe(endpoint, int(400 * token_bytes), 400 * token_s)
                found.append(ratios.recompute(cached.spec.digest, match).ratio)
            return found

        assert after(1e-5)[-1] == pytest.approx(0.15, abs=0.01)
        slower = after(0.5e-3)
        assert slower == sorted(slower)
        assert slower[-1] == pytest.approx(1 / 3, abs=0.02)
        assert after(1.0)[-1] == pytest.approx(MOST_COMPUTED, abs=0.01)


@pytest.mark.parametrize(
    "settings", [{"recompute_selector": "first_k", "recompute_drift": True}, {"recompute_drift": False}]
)
def test_the_ratio_stays_where_all_tokens_travel(
    cluster: ServedCluster, prompt: torch.Tensor, tmp_path: Path, settings: dict[str, Any]
) -> None:
    with worker(cluster, cache_dir=tmp_path, **settings) as cached:
        match = match_of(cached, prompt)
        ratios = Ratios(cached.client.settings, cached.client.links)
        for _ in range(20):
            ratios.computed(100, 1e-4)
            cached.client.links.observe(match.chunks[0].member.endpoint, 1 << 20, 10.0)
            assert ratios.recompute(cached.spec.digest, match).ratio == 0.15


def test_requests_feed_what_computing_a_token_takes(
    cluster: ServedCluster, prompt: torch.Tensor, tmp_path: Path
) -> None:
    """Over a link that is far slower than this model, more and more is computed."""
    with worker(cluster, cache_dir=tmp_path, **KNOWS_BEFOREHAND) as cached:
        endpoint = match_of(cached, prompt).chunks[0].member.endpoint
        found = [recomputed(cached, prompt)]
        for _ in range(6):
            cached.client.links.observe(endpoint, 1 << 20, 1000.0)
            found.append(recomputed(cached, prompt))
        assert found[0] == sum(int(0.15 * tokens) for tokens in (256, 256, 256))
        assert found[-1] > 2 * found[0]
