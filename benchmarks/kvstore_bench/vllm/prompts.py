"""The prompts: windows of a document that no calibration was made of."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvstore_codec.errors import ConfigurationError


@dataclass(frozen=True, slots=True)
class Prompt:
    text: int
    """Number of the text among those of its length."""
    ids: tuple[int, ...]


def token_ids(model: Path, text: str) -> list[int]:
    """The tokens of a text. Raises ConfigurationError for a folder without a tokenizer."""
    from transformers import AutoTokenizer

    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(model, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"cannot load a tokenizer from {model}: {error}") from error
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    return ids


def windows(ids: Sequence[int], lengths: Iterable[int], texts: int) -> dict[int, list[Prompt]]:
    """Prompts by their length. No two begin at the same token, so none is the beginning of another one, and no engine
    can reuse one for another. Raises ConfigurationError when the document is too short."""
    found: dict[int, list[Prompt]] = {}
    lengths = list(lengths)
    starts = len(lengths) * texts
    spare = len(ids) - max(lengths)
    if spare < starts:
        raise ConfigurationError(
            f"the document has {len(ids)} tokens, too few for {texts} prompts of {max(lengths)} tokens"
        )
    step = spare // starts
    for place, length in enumerate(lengths):
        begins = [(place * texts + text) * step for text in range(texts)]
        found[length] = [
            Prompt(text, tuple(ids[begin : begin + length])) for text, begin in enumerate(begins)
        ]
    return found
