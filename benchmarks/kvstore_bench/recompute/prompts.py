"""Makes the prompts: a system prefix, stored documents and a question, each tokenised alone.

Fidelity is measured on two kinds. "text": the documents are neighbouring pieces of one text that were prefilled apart,
and the question is the continuation of the text. "documents": the documents are from different places, two of them
contain one made-up fact each, and the question needs both facts.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from kvstore_bench.codec.texts import Source, tokens_of
from kvstore_bench.recompute.facts import PAIRS, FactPair
from kvstore_codec.errors import ConfigurationError

DOCUMENT_TOKENS = 512
"""A multiple of the chunk size, so that whole documents are reused."""
_PIECES, _CONTINUATION_TOKENS = 4, 128
_DOCUMENTS = 6
_WITH_FACTS = (1, 4)
"""Indices of the documents with facts. The first document has none, because it is reused exactly: its position is the
one it was stored at."""
_SYSTEM = (
    "You are a careful assistant who answers from the documents that follow. They come in no particular order. Read "
    "all of them before you answer, say only what they say, and say so where they do not tell. Answer in one short "
    "sentence, without repeating the question, and do not mention the documents.\n\n"
)
_TIMED_QUESTION = (
    "\n\nQuestion: Which of the documents above is the longest, what is it about, and which of its sentences would you "
    "leave out first if you had to make it shorter? Give a reason.\nAnswer:"
)
_STORING_QUESTION = "\n\nQuestion: What is this document about?\nAnswer:"


@dataclass(frozen=True, slots=True)
class Prompt:
    """Token IDs of the parts of a prompt, i64 `[tokens]` each."""

    kind: str
    source: str
    system: torch.Tensor
    documents: tuple[torch.Tensor, ...]
    question: torch.Tensor

    @property
    def ids(self) -> torch.Tensor:
        """Token IDs of the whole prompt, `[1, tokens]`."""
        return torch.cat((self.system, *self.documents, self.question)).unsqueeze(0)

    @property
    def segments(self) -> list[int]:
        """Lengths of the parts, tokens."""
        return [len(part) for part in (self.system, *self.documents, self.question)]

    @property
    def document_tokens(self) -> int:
        return sum(map(len, self.documents))

    def ordered(self, order: Sequence[int]) -> "Prompt":
        """The same prompt with its documents in another order."""
        documents = tuple(self.documents[index] for index in order)
        return Prompt(self.kind, self.source, self.system, documents, self.question)


class Prompts:
    """Makes prompts from `sources` in alternation. Its methods raise ConfigurationError for a text that is too
    short."""

    def __init__(self, sources: Sequence[Source], tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._texts = [(source.name, tokens_of(source, tokenizer)) for source in sources]
        self._system = self._tokens(_SYSTEM)

    @property
    def sources(self) -> list[str]:
        return [name for name, _ in self._texts]

    def text(self, count: int) -> list[Prompt]:
        """Makes `count` prompts of the kind "text"."""
        parts = [DOCUMENT_TOKENS] * _PIECES + [_CONTINUATION_TOKENS]
        return [self._pieces(number, count, parts) for number in range(count)]

    def documents(self, count: int) -> list[Prompt]:
        """Makes `count` prompts of the kind "documents". Raises ConfigurationError for more than there are pairs of
        facts."""
        if count > len(PAIRS):
            raise ConfigurationError(
                f"there are only questions for {len(PAIRS)} prompts per kind, not for {count}"
            )
        return [self._with_facts(number, count, PAIRS[number]) for number in range(count)]

    def timed(self, tokens: int) -> Prompt:
        """Makes the timed prompt, with `tokens` tokens of documents and no facts."""
        name, text = self._texts[0]
        question = self._tokens(_TIMED_QUESTION)
        return Prompt(
            "timed", name, self._system, self._apart(text, tokens // DOCUMENT_TOKENS, 0.5), question
        )

    def storing(self, prompt: Prompt, index: int) -> Prompt:
        """Makes the request that stores one of the prompt's documents. It contains no other document."""
        question = self._tokens(_STORING_QUESTION)
        return Prompt("storing", prompt.source, prompt.system, (prompt.documents[index],), question)

    def _pieces(self, number: int, count: int, parts: Sequence[int]) -> Prompt:
        name, text = self._texts[number % len(self._texts)]
        room = _room(name, text, sum(parts))
        begin = room * number // count
        *documents, question = torch.split(text[begin : begin + sum(parts)], list(parts))
        return Prompt("text", name, self._system, tuple(documents), question)

    def _with_facts(self, number: int, count: int, pair: FactPair) -> Prompt:
        name, text = self._texts[number % len(self._texts)]
        documents = list(self._apart(text, _DOCUMENTS, number / count))
        for index, fact in zip(_WITH_FACTS, (pair.first, pair.second), strict=True):
            middle = DOCUMENT_TOKENS // 2
            with_fact = torch.cat(
                (documents[index][:middle], self._tokens(f" {fact} "), documents[index][middle:])
            )
            documents[index] = with_fact[:DOCUMENT_TOKENS]
        question = self._tokens(f"\n\nQuestion: {pair.question}\nAnswer:")
        return Prompt("documents", name, self._system, tuple(documents), question)

    def _apart(self, text: torch.Tensor, count: int, shift: float) -> tuple[torch.Tensor, ...]:
        """Cuts `count` documents from evenly spaced places of a text. `shift`, 0 to 1, moves all of them."""
        room = _room("the text", text, (count + 1) * DOCUMENT_TOKENS)
        begins = [int(room * (number + shift) / count) for number in range(count)]
        return tuple(text[begin : begin + DOCUMENT_TOKENS] for begin in begins)

    def _tokens(self, text: str) -> torch.Tensor:
        return torch.tensor(self._tokenizer(text, add_special_tokens=False).input_ids, dtype=torch.int64)


def orders(documents: int, count: int) -> list[list[int]]:
    """Returns `count` orders of the documents. They are random, but the same in every run."""
    seeded = (torch.Generator().manual_seed(number) for number in range(count))
    return [torch.randperm(documents, generator=generator).tolist() for generator in seeded]


def _room(name: str, text: torch.Tensor, tokens: int) -> int:
    """Largest offset at which a piece of `tokens` tokens begins. Raises ConfigurationError for a shorter text."""
    if len(text) < tokens:
        raise ConfigurationError(f"{name} has {len(text)} tokens, but a prompt needs {tokens}")
    return len(text) - tokens
