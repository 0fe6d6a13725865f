"""The text that is measured on: documents that no calibration was made of."""

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
    """Neighbouring tokens of one text, i64 [tokens] each."""

    document: torch.Tensor
    """Whose KV is stored."""
    question: torch.Tensor
    continuation: torch.Tensor
    """What the text goes on with; KL is measured on it."""

    @property
    def ids(self) -> torch.Tensor:
        """What the model is asked, [1, tokens]."""
        return torch.cat((self.document, self.question)).unsqueeze(0)


def sources() -> tuple[list[Source], list[Source]]:
    """To measure on, and to calibrate on."""
    halves = [split(source) for source in default_sources()]
    return [measured for measured, _ in halves], [learnt for _, learnt in halves]


def prompts(measured: Sequence[Source], tokenizer: Any, lengths: Iterable[int]) -> dict[int, Prompt]:
    """By tokens of the document; each from a place of its own. Raises ConfigurationError."""
    text = torch.cat([tokens_of(source, tokenizer) for source in reversed(measured)])
    found: dict[int, Prompt] = {}
    begin = 0
    for length in lengths:
        parts = [length, QUESTION_TOKENS, CONTINUATION_TOKENS]
        piece = text[begin : begin + sum(parts)]
        if len(piece) < sum(parts):
            raise ConfigurationError(
                f"the text has {len(text)} tokens, too few for documents as long as --tokens says"
            )
        found[length] = Prompt(*torch.split(piece, parts))
        begin += sum(parts)
    return found
