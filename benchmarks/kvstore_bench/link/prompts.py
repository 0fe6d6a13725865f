"""The prompts: documents that no calibration was fitted to, each with a question."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from kvstore_bench.codec.texts import Source, default_sources, split, tokens_of
from kvstore_codec.errors import ConfigurationError

QUESTION_TOKENS = 40
CONTINUATION_TOKENS = 160


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt and its continuation: neighbouring pieces of one text, token IDs i64 `[tokens]` each."""

    document: torch.Tensor
    """Its KV is stored."""
    question: torch.Tensor
    continuation: torch.Tensor
    """The text after the question. KL is measured on it."""

    @property
    def ids(self) -> torch.Tensor:
        """Token IDs of the whole prompt, `[1, tokens]`."""
        return torch.cat((self.document, self.question)).unsqueeze(0)


def sources() -> tuple[list[Source], list[Source]]:
    """The texts to measure on, and the texts to fit a calibration to."""
    halves = [split(source) for source in default_sources()]
    return [measured for measured, _ in halves], [fitted for _, fitted in halves]


def prompts(measured: Sequence[Source], tokenizer: Any, lengths: Iterable[int]) -> dict[int, Prompt]:
    """One prompt for each document length, by that length. They do not overlap. Raises ConfigurationError for a text
    that is too short."""
    text = torch.cat([tokens_of(source, tokenizer) for source in reversed(measured)])
    found: dict[int, Prompt] = {}
    begin = 0
    for length in lengths:
        parts = [length, QUESTION_TOKENS, CONTINUATION_TOKENS]
        piece = text[begin : begin + sum(parts)]
        if len(piece) < sum(parts):
            raise ConfigurationError(
                f"the text has only {len(text)} tokens, which is too short for documents of the lengths in --tokens"
            )
        found[length] = Prompt(*torch.split(piece, parts))
        begin += sum(parts)
    return found
