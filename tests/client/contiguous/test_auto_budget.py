"""`generate` with a budget of `auto`, through a real service: what is known decides what is read."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from kvstore_client import connect
from kvstore_client.engines.transformers import CachedModel
from kvstore_client.planning import PrefillCost
from kvstore_client.planning.losses import LossTable, PartLosses
from tests.client.conftest import ServedCluster
from tests.client.contiguous.test_generate import DOCUMENT, GREEDY, PATIENT, PROMPT
from tests.client.models import tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")

SLOW_BPS = 1e5


@contextmanager
def worker(cluster: ServedCluster, cache_dir: Path, **settings: Any) -> Iterator[CachedModel]:
    """A worker behind a link that is known to be slow, with a model that is slow to compute."""
    stored: dict[str, Any] = {"encoding": "exact-zstd,low-zstd", "fetch_policy": "adaptive"}
    stored |= {"budget": "auto", "cache_dir": cache_dir}
    with connect(cluster.address, **(PATIENT | stored | settings)) as client:
        cached = CachedModel(tiny_model(), client)
        costs = cached._session._parts.costs
        if costs is not None:
            costs.set_prefill(PrefillCost(0.0, 0.05, 0.0))
        cached.generate(DOCUMENT, max_new_tokens=1, do_sample=False)
        client.store.flush()
        for member in client._view.membership().members:
            client.links.observe(member.endpoint, int(SLOW_BPS), 1.0)
        yield cached
        cached.close()


def learn(cached: CachedModel, cache_dir: Path) -> None:
    LossTable(cache_dir).save(cached.spec.weights_digest, PartLosses.of([(0.25, 0.05), (0.5, 0.0)]), {})


def test_of_a_model_whose_losses_are_unknown_the_whole_prefix_is_read(
    cluster: ServedCluster, tmp_path: Path
) -> None:
    with worker(cluster, tmp_path, floor="low") as cached:
        cached.generate(PROMPT, **GREEDY)
        assert cached.last_report.reprefill is None
        assert cached.last_report.reused_tokens == DOCUMENT.shape[1]


def test_the_floor_decides_how_little_is_read(cluster: ServedCluster, tmp_path: Path) -> None:
    with worker(cluster, tmp_path, floor="low") as cached:
        learn(cached, tmp_path)
        cached.generate(PROMPT, **GREEDY)
        report = cached.last_report.reprefill
        assert report is not None
        assert (report.budget, report.encoding) == (0.5, "low-zstd")
        assert report.attended_tokens == DOCUMENT.shape[1] / 2
    with worker(cluster, tmp_path, floor="exact") as cached:
        output = cached.generate(PROMPT, **GREEDY)
        assert cached.last_report.reprefill is None
        assert torch.equal(output, cached.model.generate(PROMPT, **GREEDY))


def test_a_given_budget_is_read_in_the_encoding_that_suits_the_link(
    cluster: ServedCluster, tmp_path: Path
) -> None:
    with worker(cluster, tmp_path) as cached:
        cached.generate(PROMPT, budget=0.25, **GREEDY)
        assert cached.last_report.reprefill is not None
        assert cached.last_report.reprefill.encoding == "low-zstd"


def test_without_plans_auto_is_the_whole_prefix(cluster: ServedCluster, tmp_path: Path) -> None:
    with worker(cluster, tmp_path, floor="low", fetch_policy="fixed") as cached:
        learn(cached, tmp_path)
        cached.generate(PROMPT, **GREEDY)
        assert cached.last_report.reprefill is None
        cached.generate(PROMPT, budget=0.25, **GREEDY)
        assert cached.last_report.reprefill is not None
        assert cached.last_report.reprefill.encoding == "exact-zstd"


def test_reads_of_frames_teach_the_link(cluster: ServedCluster, tmp_path: Path) -> None:
    with worker(cluster, tmp_path) as cached:
        before = dict(cached.client.links.snapshot())
        cached.generate(PROMPT, budget=0.5, **GREEDY)
        (found,) = cached.client.links.snapshot().values()
        assert found != next(iter(before.values()))
