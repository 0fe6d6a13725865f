"""The prompts: whole chunks of documents, facts where they belong, and always the same."""

import pytest
import torch

from kvstore_bench.codec.texts import Document, Source
from kvstore_bench.recompute.facts import PAIRS
from kvstore_bench.recompute.prompts import Prompts, orders
from kvstore_codec.errors import ConfigurationError
from kvstore_codec.identity import CHUNK_TOKENS


class Letters:
    """A tokenizer of one token a character."""

    class Encoded:
        def __init__(self, text: str) -> None:
            self.input_ids = [ord(letter) for letter in text]

    def __call__(self, text: str, **_: object) -> "Letters.Encoded":
        return self.Encoded(text)


def text_of(ids: torch.Tensor) -> str:
    return "".join(map(chr, ids.tolist()))


def source(name: str, first: int, count: int = 12_000) -> Source:
    """Every place of it reads differently."""
    return Source(name, (Document(name, "".join(f"{number}," for number in range(first, first + count))),))


@pytest.fixture(scope="module")
def prompts() -> Prompts:
    return Prompts([source("small", 0), source("large", 500_000)], Letters())


def test_pieces_of_a_text_are_neighbours(prompts: Prompts) -> None:
    asked = prompts.text(4)
    assert [prompt.source for prompt in asked] == ["small", "large", "small", "large"]
    assert len({text_of(prompt.question) for prompt in asked}) == 4
    for prompt in asked:
        assert prompt.kind == "text"
        assert prompt.segments == [len(prompt.system), 512, 512, 512, 512, 128]
        assert prompt.ids.shape == (1, sum(prompt.segments))
        numbers = text_of(torch.cat((*prompt.documents, prompt.question))).split(",")[1:-1]
        assert [int(number) for number in numbers] == list(range(int(numbers[0]), int(numbers[-1]) + 1))


def test_two_documents_tell_what_the_question_needs(prompts: Prompts) -> None:
    asked = prompts.documents(8)
    for prompt, pair in zip(asked, PAIRS, strict=False):
        assert all(len(document) == 512 and not 512 % CHUNK_TOKENS for document in prompt.documents)
        told = [text_of(document) for document in prompt.documents]
        assert [number for number, text in enumerate(told) if pair.first in text] == [1]
        assert [number for number, text in enumerate(told) if pair.second in text] == [4]
        assert text_of(prompt.question).endswith(f"{pair.question}\nAnswer:")
        assert pair.answer in pair.second
        assert pair.answer not in pair.first + pair.question
        assert len(set(told)) == len(told) == 6
    assert {prompt.source for prompt in asked} == {"small", "large"}


def test_the_timed_prompt_has_as_many_tokens_of_documents(prompts: Prompts) -> None:
    prompt = prompts.timed(3072)
    assert prompt.document_tokens == 3072
    assert len({text_of(document) for document in prompt.documents}) == 6
    first = prompts.storing(prompt, 2)
    assert first.segments[:2] == [len(prompt.system), 512]
    assert torch.equal(first.documents[0], prompt.documents[2])


def test_orders_are_shuffles_and_always_the_same() -> None:
    found = orders(6, 16)
    assert found == orders(6, 16)
    assert all(sorted(order) == list(range(6)) for order in found)
    assert len({tuple(order) for order in found}) > 12


def test_documents_in_another_order(prompts: Prompts) -> None:
    prompt = prompts.timed(1536)
    turned = prompt.ordered([2, 0, 1])
    assert torch.equal(turned.documents[0], prompt.documents[2])
    assert turned.segments == prompt.segments


def test_too_short_a_text_is_refused() -> None:
    short = Prompts([source("short", 0, 200)], Letters())
    with pytest.raises(ConfigurationError, match="but a prompt needs"):
        short.text(2)
    with pytest.raises(ConfigurationError, match="but a prompt needs"):
        short.timed(3072)


def test_more_prompts_than_questions_are_refused(prompts: Prompts) -> None:
    with pytest.raises(ConfigurationError, match="prompts per kind"):
        prompts.documents(len(PAIRS) + 1)
