"""The prefix has the length that was asked for, and holds what the questions ask for."""

from typing import Any

import pytest
import torch

from kvstore_bench.codec.texts import Document, Source
from kvstore_bench.reprefill.prompts import make_prompts
from kvstore_codec.errors import ConfigurationError


class Letters:
    """A tokenizer of single characters."""

    def __call__(self, text: str, **options: Any) -> Any:
        return type("Encoded", (), {"input_ids": [ord(letter) % 512 for letter in text]})

    def decode(self, tokens: torch.Tensor) -> str:
        return "".join(map(chr, tokens.tolist()))


LONG = Source("long", (Document("long", "All work and no play makes Jack a dull boy. " * 200),))


def test_facts_and_quotes_are_in_the_prefix() -> None:
    prompts = make_prompts(LONG, Letters(), 2048, 9)
    assert len(prompts.prefix) == 2048
    assert [question.kind for question in prompts.questions] == ["fact", "quote", "text"] * 3
    text = Letters().decode(prompts.prefix)
    for question in prompts.questions:
        judged = Letters().decode(question.tokens[-question.judged :])
        if question.kind != "text":
            assert judged.strip() in text
        if question.answer is not None:
            assert question.answer in judged
    assert prompts.prompt(prompts.questions[0]).shape == (1, 2048 + len(prompts.questions[0].tokens))


def test_a_short_source_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="too few"):
        make_prompts(LONG, Letters(), 16384, 9)
