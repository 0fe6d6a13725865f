"""Other models, encodings and ways of planning than the plainest."""

from pathlib import Path

import pytest
import torch

from kvstore_client import connect
from kvstore_client.engines.transformers import CachedModel
from kvstore_client.recompute import Recompute
from kvstore_client.settings import SelectorName
from tests.client.blend.library import (
    ALL,
    DOCUMENTS,
    GREEDY,
    PATIENT,
    QUESTION,
    SYSTEM,
    Library,
    check_close,
    joined,
    text,
)
from tests.client.blend.reference import sharp
from tests.client.conftest import ServedCluster
from tests.client.models import tiny_model

BOTH = [DOCUMENTS[3], DOCUMENTS[2]]
REORDERED = [SYSTEM, *reversed(BOTH), QUESTION]


@pytest.mark.parametrize(
    "library", ["llama3-rope", "qwen2-windows", "qwen3", "mistral-windows"], indirect=True
)
def test_every_family_through_the_service(library: Library) -> None:
    segments = [SYSTEM, *BOTH, QUESTION]
    library.stock(*segments)
    check_close(library.asked(*segments), library.plainly_asked(*segments))
    assert torch.equal(library.answer(*segments), library.plain(*segments))
    assert library.cached.last_report.exact_tokens == 1280
    check_close(library.asked(*REORDERED, recompute=ALL), library.plainly_asked(*REORDERED))
    own = library.plainly_asked(*REORDERED)
    off = [
        float((library.asked(*REORDERED, recompute=Recompute(ratio=ratio)) - own).abs().mean())
        for ratio in (0.0, 0.9)
    ]
    # Through windows of 96 tokens, five layers look no further than the last document, which is near to exact.
    assert off[0] > off[1] or max(off) < 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_through_the_service(cluster: ServedCluster, dtype: torch.dtype) -> None:
    with connect(cluster.address, **PATIENT) as client:
        cached = CachedModel(tiny_model("qwen3", dtype), client)
        prompt, lengths = joined(SYSTEM, *BOTH, QUESTION)
        cached.generate(prompt, segments=lengths, **GREEDY)
        client.store.flush()
        prompt, lengths = joined(*REORDERED)
        for name in SelectorName:
            answer = cached.generate(prompt, segments=lengths, recompute=Recompute(name), **GREEDY)
            assert cached.last_report.approximate_tokens == 1024
            assert answer.shape == (1, prompt.shape[1] + 6)
        cached.close()


@pytest.mark.parametrize("policy", ["adaptive", pytest.param("kvfetcher", marks=pytest.mark.slow), "fixed"])
def test_every_way_of_planning(cluster: ServedCluster, policy: str, tmp_path: Path) -> None:
    """A model this small computes sooner than anything comes: it may well be that nothing is reused."""
    model = sharp("llama")
    settings = {"encoding": "exact-zstd,high-zstd,low-zstd", "floor": "low", "cache_dir": tmp_path, **PATIENT}
    with connect(cluster.address, fetch_policy=policy, **settings) as client:
        cached = CachedModel(model, client)
        prompt, lengths = joined(SYSTEM, *BOTH, QUESTION)
        cached.generate(prompt, segments=lengths, **GREEDY)
        client.store.flush()
        for segments in (REORDERED, [SYSTEM, *BOTH, text(20, 40)], [SYSTEM, text(300, 41), *BOTH, QUESTION]):
            prompt, lengths = joined(*segments)
            for _ in range(3):
                answer = cached.generate(prompt, segments=lengths, **GREEDY)
                client.store.flush()
                report = cached.last_report
                assert report.bypassed is None
                assert torch.equal(answer[:, : prompt.shape[1]], prompt)
                if not report.reused_tokens:
                    assert torch.equal(answer, model.generate(prompt, **GREEDY))
                elif policy == "fixed":
                    assert report.fetch is not None
                    assert [encoding.name for encoding in report.fetch.encodings] == ["exact-zstd"]
        assert client.metrics.snapshot().get("miss_internal_error", 0) == 0
        cached.close()
    cluster.check_nothing_is_held()


def test_what_is_computed_behind_lossy_kv_is_not_stored_as_exact(cluster: ServedCluster) -> None:
    model = sharp("llama")
    with connect(cluster.address, encoding="low-zstd", **PATIENT) as writer:
        cached = CachedModel(model, writer)
        prompt, lengths = joined(SYSTEM, *BOTH, QUESTION)
        cached.generate(prompt, segments=lengths, **GREEDY)
        writer.store.flush()
        cached.close()
    prompt, lengths = joined(SYSTEM, *BOTH, text(256, 42), QUESTION)
    for encoding, stored in (("exact-zstd", 0), ("low-zstd", 1)):
        with connect(cluster.address, encoding=encoding, accept=("low-zstd",), **PATIENT) as client:
            before = cluster.stored_chunks()
            cached = CachedModel(model, client)
            cached.generate(prompt, segments=lengths, **GREEDY)
            assert cached.last_report.reused_tokens == 1280
            client.store.flush()
            assert cluster.stored_chunks() - before == stored
            cached.close()


@pytest.mark.parametrize("drift", [False, True])
def test_frequency_goes_by_the_order_that_was_stored(cluster: ServedCluster, drift: bool) -> None:
    """Without drift its tokens need not travel."""
    model = sharp("llama")
    settings = PATIENT | {"recompute_selector": "frequency", "recompute_ratio": 0.5, "recompute_drift": drift}
    with connect(cluster.address, **settings) as client:
        cached = CachedModel(model, client)
        prompt, lengths = joined(SYSTEM, *BOTH, QUESTION)
        cached.generate(prompt, segments=lengths, **GREEDY)
        client.store.flush()
        prompt, lengths = joined(*REORDERED)
        cached.generate(prompt, segments=lengths, **GREEDY)
        report = cached.last_report
        assert (report.approximate_tokens, report.recomputed_tokens) == (1024, 512)
        cached.close()


def test_frames_that_are_computed_do_not_travel(library: Library) -> None:
    """`first_k` at .5: two frames of four of each chunk. The answer is the same as if they had come."""
    library.stock(SYSTEM, *BOTH, QUESTION)
    received = []
    answers = []
    for drift in (False, True):
        recompute = Recompute(SelectorName.FIRST_K, 0.5, drift)
        answers.append(library.answer(*REORDERED, recompute=recompute))
        report = library.cached.last_report.fetch
        assert report is not None
        assert report.complete
        received.append(report.received_bytes)
    # One exact chunk of four frames, and four approximate ones.
    assert received[0] / received[1] == pytest.approx((4 + 4 * 2) / (4 + 4 * 4), rel=0.02)
    nothing_travels_less = Recompute(SelectorName.FIRST_K, 0.5, drift=False)
    one = library.asked(*REORDERED, recompute=nothing_travels_less)
    library.cached.client.buffers.release(spoiled(library))
    check_close(library.asked(*REORDERED, recompute=nothing_travels_less), one)


def spoiled(library: Library) -> object:
    """The buffers that come next, full of NaN."""
    buffers = library.client.buffers.acquire(library.cached.spec, 4000)
    buffers.keys.fill_(torch.nan)
    buffers.values.fill_(torch.nan)
    return buffers


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(
            name, marks=[] if name in (SelectorName.FOCUS, SelectorName.HKVD) else [pytest.mark.slow]
        )
        for name in SelectorName
    ],
)
def test_what_was_in_the_buffers_does_not_matter(library: Library, name: str) -> None:
    library.stock(SYSTEM, *BOTH, QUESTION)
    segments = [SYSTEM, text(40, 50), BOTH[1], text(300, 51), BOTH[0], QUESTION]
    recompute = Recompute(name, 0.15, name == SelectorName.FOCUS)
    one = library.asked(*segments, recompute=recompute)
    library.client.buffers.release(spoiled(library))  # type: ignore[arg-type]
    assert torch.equal(library.asked(*segments, recompute=recompute), one)
