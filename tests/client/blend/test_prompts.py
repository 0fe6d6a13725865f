"""Prompts in segments, of every kind, through a real cluster."""

import itertools

import pytest
import torch

from kvstore_client import connect
from kvstore_client.engines.transformers import CachedModel
from kvstore_client.recompute import Recompute
from kvstore_client.settings import SelectorName
from kvstore_codec.errors import InvalidTokensError
from tests.client.blend.library import (
    ALL,
    CHUNKS,
    DOCUMENTS,
    GREEDY,
    NONE,
    QUESTION,
    SYSTEM,
    Library,
    check_close,
    joined,
    permuted,
    text,
)
from tests.client.models import tiny_model

EMPTY = torch.empty(0, dtype=torch.int64)


def check_all_recomputed(library: Library, *segments: torch.Tensor) -> None:
    """Whatever is reused, positions and masks are right if recomputing all of it gives the model's own answer."""
    check_close(library.asked(*segments, recompute=ALL), library.plainly_asked(*segments))
    library.cluster.check_nothing_is_held()


@pytest.mark.parametrize("order", [(4, 3, 2, 1, 0), (2, 0, 4, 1, 3), (1, 0)])
def test_documents_in_another_order(library: Library, order: tuple[int, ...]) -> None:
    library.stock()
    assert library.cluster.stored_chunks() == CHUNKS
    segments = (SYSTEM, *permuted(order), QUESTION)
    check_all_recomputed(library, *segments)
    answer = library.answer(*segments)
    report = library.cached.last_report
    approximate = sum(len(document) // 256 * 256 for document in permuted(order))
    assert report.approximate_tokens == approximate
    assert report.recomputed_tokens == int(0.15 * approximate)
    assert report.exact_tokens == 256
    assert report.reused_tokens == 256 + approximate - report.recomputed_tokens
    assert answer.shape == (1, joined(*segments)[0].shape[1] + 6)
    library.client.store.flush()
    assert library.cluster.stored_chunks() == CHUNKS


def test_the_same_order_is_the_models_own_answer(library: Library) -> None:
    """All is exact, although the documents have tails that are computed between."""
    library.stock()
    segments = (SYSTEM, *DOCUMENTS, text(50, 2000))
    check_close(library.asked(*segments), library.plainly_asked(*segments))
    assert torch.equal(library.answer(*segments), library.plain(*segments))
    report = library.cached.last_report
    assert (report.exact_tokens, report.approximate_tokens, report.recomputed_tokens) == (256 * CHUNKS, 0, 0)


@pytest.mark.parametrize(
    "segments",
    [
        pytest.param((SYSTEM, DOCUMENTS[2], DOCUMENTS[2], QUESTION), id="the same document twice"),
        pytest.param((SYSTEM, *[DOCUMENTS[1]] * 5, QUESTION), id="the same document five times"),
        pytest.param((SYSTEM, EMPTY, DOCUMENTS[4], EMPTY, EMPTY, DOCUMENTS[3], QUESTION), id="empty ones"),
        pytest.param((EMPTY, EMPTY, DOCUMENTS[3], DOCUMENTS[2], QUESTION), id="empty beginning"),
        pytest.param((SYSTEM, text(20, 7), DOCUMENTS[3], text(255, 8), DOCUMENTS[2], QUESTION), id="short"),
        pytest.param((DOCUMENTS[3], DOCUMENTS[4], QUESTION), id="no system prefix"),
        pytest.param((text(1, 5), DOCUMENTS[4], DOCUMENTS[3], text(1, 6)), id="one token before and behind"),
        pytest.param((SYSTEM, DOCUMENTS[4], DOCUMENTS[2], EMPTY), id="no question"),
        pytest.param((SYSTEM, DOCUMENTS[4], DOCUMENTS[3], EMPTY), id="no question behind a full chunk"),
        pytest.param((text(700, 9), DOCUMENTS[4], DOCUMENTS[3], DOCUMENTS[0], QUESTION), id="new text first"),
        pytest.param((SYSTEM, DOCUMENTS[4], text(900, 10), DOCUMENTS[3], QUESTION), id="new text between"),
        pytest.param((SYSTEM, DOCUMENTS[3], text(256, 12), DOCUMENTS[0]), id="the question is a document"),
    ],
)
def test_prompts_of_every_kind(library: Library, segments: tuple[torch.Tensor, ...]) -> None:
    library.stock()
    check_all_recomputed(library, *segments)
    for name in (SelectorName.FOCUS, SelectorName.HKVD, SelectorName.FIRST_K):
        answer = library.answer(*segments, recompute=Recompute(name, 0.15, name == SelectorName.FOCUS))
        assert torch.equal(answer[:, :-6], joined(*segments)[0])
    assert library.cached.last_report.bypassed is None
    assert library.counted("miss_internal_error") == 0


def test_sixty_four_documents(library: Library) -> None:
    documents = [
        text(tokens, 3000 + i)
        for i, tokens in enumerate(itertools.islice(itertools.cycle((256, 20, 0, 290)), 64))
    ]
    library.stock(SYSTEM, *documents, QUESTION)
    assert library.cluster.stored_chunks() == 33
    segments = (SYSTEM, *reversed(documents), QUESTION)
    check_all_recomputed(library, *segments)
    library.answer(*segments)
    assert library.cached.last_report.approximate_tokens == 32 * 256


@pytest.mark.parametrize(
    "segments", [(text(800, 20),), (EMPTY,), (text(1, 21),), (text(3, 22), EMPTY), (EMPTY, text(5, 23))]
)
def test_prompts_with_nothing_to_reuse(library: Library, segments: tuple[torch.Tensor, ...]) -> None:
    if not sum(map(len, segments)):
        segments = (text(300, 24), EMPTY)
    for _ in range(2):
        assert torch.equal(library.answer(*segments), library.plain(*segments))
        library.client.store.flush()


def test_one_segment_is_a_prompt_without_segments(library: Library) -> None:
    whole = torch.cat([SYSTEM, *DOCUMENTS[:2]])
    assert torch.equal(library.answer(whole), library.plain(whole))
    library.client.store.flush()
    assert torch.equal(library.answer(whole), library.plain(whole))
    assert library.cached.last_report.reused_tokens == 768
    library.cached.generate(whole[None], **GREEDY)
    assert library.cached.last_report.reused_tokens == 768


def test_prefill_where_reuse_cannot_help(library: Library) -> None:
    library.stock()
    for segments, recompute in (
        ((SYSTEM, DOCUMENTS[3], DOCUMENTS[0], text(2500, 30)), None),  # the question is longer than all else
        ((SYSTEM, DOCUMENTS[3], DOCUMENTS[0], QUESTION), ALL),
        ((SYSTEM, text(2000, 31), DOCUMENTS[0], QUESTION), None),
        ((text(3000, 32), QUESTION), None),
    ):
        assert torch.equal(library.answer(*segments, recompute=recompute), library.plain(*segments))
        report = library.cached.last_report
        assert (report.approximate_tokens, report.recomputed_tokens, report.bypassed) == (0, 0, None)
        check_all_recomputed(library, *segments)
        library.cluster.check_nothing_is_held()


@pytest.mark.parametrize("lengths", [[5], [], [256, 10], [256, 330, 1], [-1, 587], [586, -1, 1], [0]])
def test_segments_that_do_not_make_the_prompt(library: Library, lengths: list[int]) -> None:
    library.stock(SYSTEM, DOCUMENTS[1], QUESTION)
    prompt, _ = joined(SYSTEM, DOCUMENTS[1], QUESTION)
    with pytest.raises(InvalidTokensError, match="586"):
        library.cached.generate(prompt, segments=lengths, **GREEDY)
    with pytest.raises(InvalidTokensError, match="586"):
        library.cached.question_log_probabilities(prompt, segments=lengths)
    library.cluster.check_nothing_is_held()
    library.cached.generate(prompt, segments=[256, 300, 30], **GREEDY)
    assert library.cached.last_report.reused_tokens == 512


@pytest.mark.parametrize("lengths", [[256, 300.0, 30], ["256", 330], [None, 586], 586, [256, [330]]])
def test_segments_of_a_wrong_type(library: Library, lengths: object) -> None:
    with pytest.raises(TypeError):
        library.cached.generate(torch.cat([SYSTEM, DOCUMENTS[1], QUESTION])[None], segments=lengths, **GREEDY)


def test_what_recompute_is_not_leaves_nothing_leased(library: Library) -> None:
    library.stock(SYSTEM, DOCUMENTS[1], DOCUMENTS[3], QUESTION)
    with pytest.raises((TypeError, AttributeError)):
        library.answer(SYSTEM, DOCUMENTS[3], DOCUMENTS[1], QUESTION, recompute=0.15)  # type: ignore[arg-type]
    library.cluster.check_nothing_is_held()


def test_lengths_may_be_of_any_whole_number(library: Library) -> None:
    library.stock()
    prompt, lengths = joined(SYSTEM, DOCUMENTS[4], DOCUMENTS[2], QUESTION)
    expected = library.cached.generate(prompt, segments=lengths, **GREEDY)
    for given in (torch.tensor(lengths), torch.tensor(lengths).numpy(), tuple(lengths)):
        assert torch.equal(library.cached.generate(prompt, segments=given, **GREEDY), expected)
        assert library.cached.is_stored(prompt, segments=given)
        assert library.cached.last_report.approximate_tokens == 1024


def test_tenants_do_not_meet(library: Library) -> None:
    library.stock()
    segments = (SYSTEM, *reversed(DOCUMENTS), QUESTION)
    with connect(library.cluster.address, tenant_salt="another") as stranger:
        cached = CachedModel(library.cached.model, stranger, store=False)
        prompt, lengths = joined(*segments)
        for given in (lengths, None):
            answer = cached.generate(prompt, segments=given, **GREEDY)
            assert torch.equal(answer, library.plain(*segments))
            assert cached.last_report.reused_tokens == 0
        assert stranger.metrics.snapshot().get("chunks_matched_approximate", 0) == 0
        cached.close()


def test_a_family_that_cannot_blend_reuses_what_is_exact(library: Library) -> None:
    """Its segments count only in so far as they must be right."""
    model = tiny_model("gemma3")
    cached = CachedModel(model, library.client)
    prompt, lengths = joined(SYSTEM, *DOCUMENTS[:2], QUESTION)
    for reused in (0, 768):
        answer = cached.generate(prompt, segments=lengths, **GREEDY)
        assert torch.equal(answer, model.generate(prompt, **GREEDY))
        assert cached.last_report.reused_tokens == reused
        library.client.store.flush()
    with pytest.raises(InvalidTokensError):
        cached.generate(prompt, segments=[1, 2], **GREEDY)
    cached.close()


def test_nothing_recomputed_says_something_else(library: Library) -> None:
    """Else all of the above would show nothing."""
    library.stock()
    segments = (SYSTEM, *reversed(DOCUMENTS), QUESTION)
    own = library.plainly_asked(*segments)
    assert (library.asked(*segments, recompute=NONE) - own).abs().max() > 0.1
