"""What `generate` does behind a blend, and what it leaves stored."""

import copy
import itertools
from bisect import bisect_right

import pytest
import torch
from transformers import UnbatchedClassifierFreeGuidanceLogitsProcessor

from kvstore_client.recompute import Recompute, select, selector
from kvstore_client.reuse.blend.plan import reused_chunk
from kvstore_client.settings import SelectorName
from tests.client.blend.library import (
    ALL_LOGITS,
    DOCUMENTS,
    GREEDY,
    QUESTION,
    SYSTEM,
    Library,
    check_close,
    joined,
    text,
)
from tests.client.blend.reference import KV, Prompt, kv_of

BOTH = [DOCUMENTS[3], DOCUMENTS[2]]
FIRST_K = Recompute(SelectorName.FIRST_K, 0.2, drift=False)
LEAST = Recompute(SelectorName.FIRST_K, 0.0, drift=False)


def kinds(library: Library, *segments: torch.Tensor) -> list[tuple[int, bool]]:
    """Position of each stored chunk, and whether it is exact."""
    prompt, lengths = joined(*segments)
    spec = library.cached.spec
    placed = library.client.segment_chunks(spec, prompt[0].tolist(), lengths)
    match = library.client.match_segments(spec, placed)
    library.client.release(match)
    return [(chunk.first_token, chunk.exact) for chunk in match.chunks]


def check_exact_chunks(library: Library, *segments: torch.Tensor) -> None:
    """What is stored under an exact id is what the model computes of exactly that text."""
    prompt, lengths = joined(*segments)
    spec, own = library.cached.spec, kv_of(library.cached.model, prompt[0])
    placed = library.client.segment_chunks(spec, prompt[0].tolist(), lengths)
    match = library.client.match_segments(spec, placed)
    buffers = library.client.buffers.acquire(spec, prompt.shape[1])
    assert library.client.fetch(match, buffers, None).wait().complete
    for chunk in match.chunks:
        if chunk.exact:
            place = slice(chunk.first_token, chunk.first_token + 256)
            check_close(buffers.keys[:, :, place], own.keys[:, :, place])
            check_close(buffers.values[:, :, place], own.values[:, :, place])
    library.client.buffers.release(buffers)


def by_hand(
    library: Library, stocked: list[torch.Tensor], asked: list[torch.Tensor], recompute: Recompute
) -> Prompt:
    """The prompt `asked` with the KV that each chunk had in the prompt `stocked`."""
    model, spec = library.cached.model, library.cached.spec
    (then, then_lengths), (now, now_lengths) = joined(*stocked), joined(*asked)
    kv = kv_of(model, then[0])
    placed = library.client.segment_chunks(spec, now[0].tolist(), now_lengths)
    match = library.client.match_segments(spec, placed)
    library.client.release(match)
    first_then = {
        chunk.chunk_id: chunk.first_token
        for chunk in library.client.segment_chunks(spec, then[0].tolist(), then_lengths)
    }
    shape = (spec.layers, spec.kv_heads, now.shape[1], spec.head_dim)
    stored = KV(torch.full(shape, torch.nan), torch.full(shape, torch.nan))
    for chunk in match.chunks:
        here, there = (slice(at, at + 256) for at in (chunk.first_token, first_then[chunk.chunk_id]))
        stored.keys[:, :, here], stored.values[:, :, here] = kv.keys[:, :, there], kv.values[:, :, there]
    begins = list(itertools.accumulate(now_lengths))
    chunks = [reused_chunk(chunk, bisect_right(begins, chunk.first_token)) for chunk in match.chunks]
    return Prompt(model, now[0], chunks, now.shape[1] - now_lengths[-1], stored)


@pytest.mark.parametrize("new_tokens", [1, 2, 9])
@pytest.mark.parametrize("recompute", [FIRST_K, LEAST])
def test_generation_goes_on_from_the_very_kv(library: Library, recompute: Recompute, new_tokens: int) -> None:
    """The same KV put together by hand: the model's own hooks, cache, masks and positions."""
    stocked, asked = [SYSTEM, *BOTH, QUESTION], [SYSTEM, *reversed(BOTH), text(70, 90)]
    library.stock(*stocked)
    case = by_hand(library, stocked, asked, recompute)
    assert [chunk.exact for chunk in case.chunks] == [True, False, False, False, False]
    chosen = select(selector(recompute.selector), case.chunks, len(case.tokens), recompute.ratio)
    _, _, cache = case.expected(chosen)
    cache.crop(-1)
    arguments = ALL_LOGITS | {"max_new_tokens": new_tokens}
    expected = case.model.generate(case.tokens[None], past_key_values=cache, **arguments)
    got = library.answer(*asked, recompute=recompute, **arguments)
    assert library.cached.last_report.recomputed_tokens == len(chosen)
    assert torch.equal(got.sequences, expected.sequences)
    check_close(torch.cat(got.logits), torch.cat(expected.logits))
    plain = library.plain(*asked, **arguments)
    assert not torch.allclose(torch.cat(got.logits), torch.cat(plain.logits), rtol=1e-2, atol=1e-2)
    for ours, theirs in zip(got.past_key_values.layers, expected.past_key_values.layers, strict=True):
        check_close(ours.keys, theirs.keys)
        check_close(ours.values, theirs.values)


@pytest.mark.parametrize("reordered", [False, True])
def test_the_returned_cache_is_an_ordinary_one(library: Library, reordered: bool) -> None:
    library.stock(SYSTEM, *BOTH, QUESTION)
    segments = [SYSTEM, *(reversed(BOTH) if reordered else BOTH), QUESTION]
    output = library.answer(*segments, recompute=FIRST_K, **ALL_LOGITS)
    assert library.cached.last_report.approximate_tokens == (1024 if reordered else 0)
    copied = copy.deepcopy(output.past_key_values)
    library.answer(*segments, recompute=LEAST, **GREEDY)  # into the same buffers
    more = torch.cat([output.sequences, text(9, 91)[None]], 1)
    model = library.cached.model
    assert torch.equal(
        model.generate(more, past_key_values=copied, **GREEDY),
        model.generate(more, past_key_values=output.past_key_values, **GREEDY),
    )


def test_sampling_draws_what_the_model_would(library: Library) -> None:
    segments = [SYSTEM, *BOTH, QUESTION]
    library.stock(*segments)
    arguments = {"do_sample": True, "temperature": 1.5, "top_k": 50, "max_new_tokens": 12}
    torch.manual_seed(4)
    expected = library.plain(*segments, **arguments)
    torch.manual_seed(4)
    assert torch.equal(library.answer(*segments, **arguments), expected)
    assert library.cached.last_report.exact_tokens == 1280


class Recorder:
    def __init__(self) -> None:
        self.seen: list[torch.Tensor] = []

    def put(self, value: torch.Tensor) -> None:
        self.seen.append(value)

    def end(self) -> None:
        self.seen.append(torch.tensor([-1]))


@pytest.mark.parametrize("reordered", [False, True])
def test_a_streamer_sees_the_prompt_once(library: Library, reordered: bool) -> None:
    library.stock(SYSTEM, *BOTH, QUESTION)
    segments, recorder = [SYSTEM, *(reversed(BOTH) if reordered else BOTH), QUESTION], Recorder()
    answer = library.answer(*segments, streamer=recorder, **GREEDY)
    prompt, *new, end = recorder.seen
    assert torch.equal(prompt, joined(*segments)[0])
    assert torch.cat(new).tolist() == answer[0, prompt.shape[1] :].tolist()
    assert end == -1


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"num_beams": 2}, "mode_beam_search"),
        ({"output_attentions": True}, "argument_output_attentions"),
        ({"past_key_values": None}, "argument_past_key_values"),
    ],
)
def test_calls_that_are_passed_on(library: Library, arguments: dict[str, object], reason: str) -> None:
    segments = [SYSTEM, DOCUMENTS[3], QUESTION]
    library.stock(*segments)
    expected = library.plain(*segments, **GREEDY, **arguments)
    assert torch.equal(library.answer(*segments, **GREEDY, **arguments), expected)
    assert library.cached.last_report.bypassed == reason


def test_a_batch_is_passed_on(library: Library) -> None:
    prompts = torch.cat([joined(SYSTEM, QUESTION)[0], joined(text(256, 5), QUESTION)[0]])
    got = library.cached.generate(prompts, segments=[256, 30], **GREEDY)
    assert torch.equal(got, library.cached.model.generate(prompts, **GREEDY))
    assert library.cached.last_report.bypassed == "batch"


# ---- what is stored


def test_what_was_missed_is_stored_once(library: Library) -> None:
    library.stock(SYSTEM, *BOTH, QUESTION)
    stored, new = library.cluster.stored_chunks(), text(600, 92)
    for found in (
        [(0, True), (256, False), (512, False)],
        [(0, True), (256, False), (512, False), (856, False), (1112, False)],
    ):
        segments = [SYSTEM, DOCUMENTS[2], new, QUESTION]
        assert kinds(library, *segments) == found
        library.answer(*segments, recompute=Recompute(ratio=0.1))
        library.client.store.flush()
        assert library.cluster.stored_chunks() == stored + 2
    assert library.counted("miss_store_refused") == 0
    # It is there for other prompts, too.
    assert kinds(library, SYSTEM, text(3, 1), new, QUESTION) == [(0, True), (259, False), (515, False)]


def test_what_stands_behind_something_approximate_is_never_taken_for_exact(library: Library) -> None:
    """Segments of whole chunks: a prompt without segments asks for the very same ids."""
    library.stock(SYSTEM, DOCUMENTS[0], DOCUMENTS[3], QUESTION)
    new = text(256, 93)
    segments = [SYSTEM, DOCUMENTS[3], new, QUESTION]
    library.answer(*segments, recompute=LEAST)
    library.client.store.flush()
    assert library.cached.last_report.approximate_tokens == 512
    prompt, _ = joined(*segments)
    expected = library.plain(*segments, **ALL_LOGITS)
    for reused in (256, 1024):
        got = library.cached.generate(prompt, **ALL_LOGITS)
        library.client.store.flush()
        assert library.cached.last_report.reused_tokens == reused
        assert torch.equal(got.sequences, expected.sequences)
        check_close(torch.cat(got.logits), torch.cat(expected.logits))
    assert [exact for _, exact in kinds(library, *segments)] == [True] * 4
    got = library.answer(*segments, **ALL_LOGITS)
    assert library.cached.last_report.exact_tokens == 1024
    check_close(torch.cat(got.logits), torch.cat(expected.logits))
    check_exact_chunks(library, *segments)


def test_what_stands_before_the_first_approximate_chunk_is_exact(library: Library) -> None:
    library.stock(SYSTEM, *BOTH, QUESTION)
    new = text(300, 94)
    library.answer(SYSTEM, new, *BOTH, QUESTION, recompute=FIRST_K)
    library.client.store.flush()
    assert kinds(library, SYSTEM, new, QUESTION) == [(0, True), (256, True)]
    check_exact_chunks(library, SYSTEM, new, QUESTION)
    check_exact_chunks(library, SYSTEM, *BOTH, QUESTION)


@pytest.mark.parametrize("seed", range(3))
def test_many_prompts_leave_only_true_chunks(library: Library, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    documents = [text(tokens, 100 + tokens) for tokens in (256, 300, 512, 20, 0, 256 + 7)]
    prompts: list[list[torch.Tensor]] = []
    for number in range(10):
        order = torch.randperm(len(documents), generator=generator)[: 2 + number % 4].tolist()
        prompts.append([SYSTEM, *(documents[i] for i in order), text(20 + number, number)])
        name = list(SelectorName)[number % len(SelectorName)]
        library.answer(*prompts[-1], recompute=Recompute(name, 0.1 * (number % 4), number % 2 == 0))
        library.client.store.flush()
    found = 0
    for segments in prompts:
        check_exact_chunks(library, *segments)
        found += sum(exact for _, exact in kinds(library, *segments))
    assert found > len(prompts)
    assert library.counted("miss_store_internal_error") == 0


def test_a_model_asked_by_a_logits_processor_poisons_nothing(library: Library) -> None:
    asking = UnbatchedClassifierFreeGuidanceLogitsProcessor(1.5, library.cached.model)
    segments = [SYSTEM, *BOTH, QUESTION]
    library.answer(*segments, logits_processor=[asking], do_sample=False, max_new_tokens=20)
    library.client.store.flush()
    assert kinds(library, *segments)
    check_exact_chunks(library, *segments)
