"""Cuts texts into passages: some to fit a calibration to, others held out to measure it."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest

import torch

from kvstore_codec.errors import CalibrationError

CONTEXT_TOKENS = 2048
CONTINUATION_TOKENS = 384
_HELD_OUT = 4
"""Most held-out passages."""
_HELD_OUT_SHARE = 5
"""One passage in this many is held out, from the end of each text."""
_FEWEST = 6
"""Fewest passages. Short texts give shorter passages, so that there are this many."""
_SHORTEST = 64


@dataclass(frozen=True, slots=True)
class Passage:
    """Consecutive tokens of one text, i64. The KV of `context` is encoded, and the model predicts `continuation`."""

    context: torch.Tensor
    continuation: torch.Tensor


@dataclass(frozen=True, slots=True)
class Plan:
    """Passages that a calibration is fitted to, and passages that it is measured on."""

    fitted: tuple[Passage, ...]
    held_out: tuple[Passage, ...]


def plan_passages(texts: Sequence[torch.Tensor], tokens: int, longest: int) -> Plan:
    """Cut `texts` (token ids, i64 `[tokens]`) into passages of equal length, at most `longest` tokens each.

    Takes passages from all texts in turn until their contexts hold `tokens` tokens. Texts shorter than a passage are
    joined. Raises CalibrationError when there is too little text.
    """
    total = sum(len(text) for text in texts)
    length = min(CONTEXT_TOKENS + CONTINUATION_TOKENS, longest, total // _FEWEST)
    if length < _SHORTEST:
        raise CalibrationError(
            f"the texts have {total} tokens; a calibration needs at least {_FEWEST * _SHORTEST} and is poor "
            f"below {_FEWEST * (CONTEXT_TOKENS + CONTINUATION_TOKENS)}"
        )
    long = [text for text in texts if len(text) >= length]
    short = [text for text in texts if len(text) < length]
    cut = [_cut(text, length) for text in (*long, *([torch.cat(short)] if short else []))]
    held_out = [passages[len(passages) - len(passages) // _HELD_OUT_SHARE :] for passages in cut]
    if not any(held_out):
        longest_text = max(range(len(cut)), key=lambda index: len(cut[index]))
        held_out[longest_text] = cut[longest_text][-1:]
    fitted = _in_turn(
        [passages[: len(passages) - len(kept)] for passages, kept in zip(cut, held_out, strict=True)]
    )
    if not fitted:
        raise CalibrationError(
            "the texts give a single passage; a calibration needs one to fit and another to measure; add text"
        )
    wanted = max(1, -(-tokens // len(fitted[0].context)))
    return Plan(tuple(fitted[:wanted]), tuple(_in_turn(held_out)[:_HELD_OUT]))


def _cut(text: torch.Tensor, length: int) -> list[Passage]:
    context = length * CONTEXT_TOKENS // (CONTEXT_TOKENS + CONTINUATION_TOKENS)
    return [
        Passage(text[first : first + context], text[first + context : first + length])
        for first in range(0, len(text) - length + 1, length)
    ]


def _in_turn(lists: list[list[Passage]]) -> list[Passage]:
    """The first passage of each list, then the second of each, and so on."""
    return [passage for passage in chain(*zip_longest(*lists)) if passage is not None]
