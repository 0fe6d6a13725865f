"""What must not be reused, must not be reused twice, and must not be waited for."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from kvstore_bench.shaping import ShapedLink
from kvstore_client import connect
from kvstore_client.engines.transformers import CachedModel
from kvstore_client.recompute import Recompute
from kvstore_client.reuse.segments import SegmentGeneration
from tests.client.blend.library import (
    CHUNKS,
    DOCUMENTS,
    GREEDY,
    PATIENT,
    QUESTION,
    SYSTEM,
    Library,
    joined,
    text,
)
from tests.client.blend.reference import sharp
from tests.client.conftest import served_cluster

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def library(tmp_path: Path) -> Iterator[Library]:
    with served_cluster(tmp_path) as cluster, connect(cluster.address, **PATIENT) as client:
        cached = CachedModel(sharp("llama"), client)
        yield Library(cluster, client, cached)
        cached.close()


def test_a_prompt_that_begins_with_the_middle_of_a_text_computes_that(library: Library) -> None:
    """What everything attends to at a beginning is not in the middle of a text."""
    library.stock()
    library.answer(DOCUMENTS[2], DOCUMENTS[0], QUESTION)
    report = library.cached.last_report
    assert (report.exact_tokens, report.approximate_tokens) == (
        0,
        512,
    )  # of three chunks the first is computed
    library.client.store.flush()
    library.answer(DOCUMENTS[2], DOCUMENTS[0], QUESTION)
    report = library.cached.last_report
    assert (report.exact_tokens, report.approximate_tokens) == (256, 512)  # and stored as the beginning it is


def test_layers_with_hooks_are_not_passed_over(library: Library) -> None:
    library.stock()
    model, shift = library.cached.model, torch.randn(64) * 0.5

    def move(_module: object, _inputs: object, output: torch.Tensor | tuple) -> torch.Tensor | tuple:
        return (output[0] + shift, *output[1:]) if isinstance(output, tuple) else output + shift

    segments = (SYSTEM, *reversed(DOCUMENTS[:2]), QUESTION)
    for module in (model.model.layers[1].mlp, model.model.layers[1]):
        hook = module.register_forward_hook(move)
        answer = library.answer(*segments, recompute=Recompute(ratio=0.1))
        assert torch.equal(answer, library.plain(*segments))
        assert library.cached.last_report.bypassed == "forward_hook"
        assert not library.cached.last_report.reused_tokens
        hook.remove()
    library.answer(*segments, recompute=Recompute(ratio=0.1))
    assert library.cached.last_report.approximate_tokens


def test_weights_that_change_on_the_way_are_another_model(library: Library) -> None:
    library.stock()
    segments = (SYSTEM, *reversed(DOCUMENTS[:2]), QUESTION)
    prompt, lengths = joined(*segments)
    begun = library.cached.begin(prompt, segments=lengths, **GREEDY)
    with torch.no_grad():
        for parameter in library.cached.model.parameters():
            parameter.mul_(1 + 0.3 * torch.rand_like(parameter))
    assert torch.equal(library.cached.finish(begun), library.plain(*segments))
    assert library.cached.last_report.reused_tokens == 0
    library.cluster.check_nothing_is_held()


def test_cancelling_what_was_finished_gives_nothing_back_twice(library: Library) -> None:
    library.stock()
    prompt, lengths = joined(SYSTEM, *reversed(DOCUMENTS[:2]), QUESTION)
    first = library.cached.begin(prompt, segments=lengths, **GREEDY)
    library.cached.finish(first)
    second = library.cached.begin(prompt, segments=lengths, **GREEDY)
    library.cached.cancel(first)
    third = library.cached.begin(prompt, segments=lengths, **GREEDY)
    assert isinstance(second, SegmentGeneration)
    assert isinstance(third, SegmentGeneration)
    assert second.incoming is not None
    assert third.incoming is not None
    assert second.incoming.buffers.memory.data_ptr() != third.incoming.buffers.memory.data_ptr()
    library.cached.cancel(second)
    library.cached.cancel(third)


def test_segments_lose_nothing_that_a_plain_prompt_reuses(library: Library) -> None:
    begin, question = text(1024, 41), text(1700, 42)
    library.cached.generate(begin[None], **GREEDY)
    library.client.store.flush()
    prompt, lengths = joined(begin, question)
    assert torch.equal(
        library.cached.generate(prompt, segments=lengths, **GREEDY), library.plain(begin, question)
    )
    assert library.cached.last_report.exact_tokens == 1024


def test_no_memory_in_a_blend_is_a_prefill(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    library.stock()
    segments = (SYSTEM, *reversed(DOCUMENTS[:2]), QUESTION)

    def full(*_: object, **__: object) -> None:
        raise RuntimeError("can't allocate memory")

    monkeypatch.setattr("kvstore_client.reuse.blend.executor.CausalBlocks.__init__", full)
    assert torch.equal(library.answer(*segments), library.plain(*segments))
    assert library.cached.last_report.reused_tokens == 0
    library.cluster.check_nothing_is_held()


def test_a_fetch_slower_than_computing_is_given_up(tmp_path: Path) -> None:
    model = sharp("llama")
    with served_cluster(tmp_path) as cluster:
        with connect(cluster.address, **PATIENT) as client:
            cached = CachedModel(model, client)
            Library(cluster, client, cached).stock()
            cached.close()
        endpoint = cluster.servers[0].address
        with (
            ShapedLink(endpoint, bandwidth_bps=2e6) as link,
            connect(
                cluster.address, routes={endpoint: link.address}, fetch_policy="adaptive", **PATIENT
            ) as client,
        ):
            cached = CachedModel(model, client, store=False)
            slow = Library(cluster, client, cached)
            segments = (SYSTEM, *reversed(DOCUMENTS), QUESTION)
            assert torch.equal(slow.answer(*segments), slow.plain(*segments))
            assert slow.cached.last_report.reused_tokens == 0
            assert slow.counted("chunks_delivered") < CHUNKS
            cached.close()
