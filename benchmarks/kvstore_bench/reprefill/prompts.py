"""A long prefix with facts in it, and questions about it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from kvstore_bench.codec.texts import Source, tokens_of
from kvstore_codec.errors import ConfigurationError

_FACTS = (
    ("the harbour office", "The harbour office of Brennholm is painted green.", "green"),
    ("the ferry Adelheid", "The ferry Adelheid leaves only on Thursday.", "Thursday"),
    ("Doctor Ocampo", "Doctor Ocampo was born in Lisbon.", "Lisbon"),
    ("the archive", "The archive in Tarnow Street is opened with the code 7419.", "7419"),
    ("the baker Olsen", "The baker Olsen sells only bread made of rye.", "rye"),
    ("the mountain Kestrel", "The mountain Kestrel is 2310 metres high.", "2310"),
    ("the ship Aurelia", "The ship Aurelia carries a cargo of copper.", "copper"),
    ("Captain Varga", "Captain Varga keeps a parrot in his cabin.", "parrot"),
)
_CONTINUED_TOKENS = 64
_QUOTED_TOKENS = 24


@dataclass(frozen=True, slots=True)
class Question:
    kind: str
    """`fact`: the answer is one sentence of the prefix. `quote`: the prefix goes on after a quote. `text`: the text
    that follows the prefix."""
    tokens: torch.Tensor
    """i64 `[tokens]`."""
    judged: int
    """Number of last tokens whose predictions are compared."""
    answer: str | None = None
    """A word that a right answer contains."""


@dataclass(frozen=True, slots=True)
class Prompts:
    prefix: torch.Tensor
    """i64 `[tokens]`."""
    questions: tuple[Question, ...]

    def prompt(self, question: Question) -> torch.Tensor:
        """`[1, tokens]`"""
        return torch.cat((self.prefix, question.tokens)).unsqueeze(0)


def make_prompts(source: Source, tokenizer: Any, prefix_tokens: int, questions: int) -> Prompts:
    """A prefix of this length, with a fact in every eighth of it, and questions of the three kinds by turns. Raises
    ConfigurationError for a source that is too short."""
    text = tokens_of(source, tokenizer)
    facts = [_encode(tokenizer, f"\n\n{sentence}\n\n") for _, sentence, _ in _FACTS]
    plain = prefix_tokens - sum(map(len, facts))
    if plain < len(_FACTS) or len(text) < plain + questions * _CONTINUED_TOKENS:
        raise ConfigurationError(
            f"{source.name} has {len(text)} tokens: too few for a prefix of {prefix_tokens} and {questions} questions"
        )
    pieces = list(text[:plain].tensor_split(len(facts)))
    prefix = torch.cat([part for pair in zip(pieces, facts, strict=True) for part in pair])
    makers = (_fact, _quote, _text)
    made = (makers[n % 3](n // 3, questions, tokenizer, prefix, text[plain:]) for n in range(questions))
    return Prompts(prefix, tuple(made))


def _fact(number: int, _count: int, tokenizer: Any, _prefix: torch.Tensor, _rest: torch.Tensor) -> Question:
    subject, sentence, answer = _FACTS[number % len(_FACTS)]
    asked = _encode(tokenizer, f"\n\nQuestion: What does the text say about {subject}?\nAnswer:")
    told = _encode(tokenizer, f" {sentence}")
    return Question("fact", torch.cat((asked, told)), len(told), answer)


def _quote(number: int, count: int, tokenizer: Any, prefix: torch.Tensor, _rest: torch.Tensor) -> Question:
    begin = (2 * number + 1) * len(prefix) // (2 * count)
    quoted, told = prefix[begin : begin + _QUOTED_TOKENS + 32].tensor_split([_QUOTED_TOKENS])
    before = _encode(tokenizer, "\n\nQuestion: How does the text go on after these words?\n")
    between = _encode(tokenizer, "\nAnswer: ")
    return Question("quote", torch.cat((before, quoted, between, told)), len(told))


def _text(number: int, _count: int, _tokenizer: Any, _prefix: torch.Tensor, rest: torch.Tensor) -> Question:
    tokens = rest[number * _CONTINUED_TOKENS : (number + 1) * _CONTINUED_TOKENS]
    return Question("text", tokens, len(tokens))


def _encode(tokenizer: Any, text: str) -> torch.Tensor:
    return torch.tensor(tokenizer(text, add_special_tokens=False).input_ids)
