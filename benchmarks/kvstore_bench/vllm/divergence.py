"""How much reused KV changes the distribution of the next token, as vLLM computes it and its server tells it.

A prompt is asked at several lengths. All of them are longer than the part that is reused, so that each distribution
comes from reused KV and from KV that was computed behind it, as in a request that is served.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from kvstore_bench.vllm.completions import Answer, Completions, NextToken
from kvstore_bench.vllm.http_call import RequestError
from kvstore_bench.vllm.prompts import Prompt
from kvstore_bench.vllm.stores import Store
from kvstore_bench.vllm.storing import store_prompts
from kvstore_codec.errors import ConfigurationError
from kvstore_codec.identity import CHUNK_TOKENS

_SILENCE_S = 240.0
_ATTEMPTS = 5
"""On a busy machine a lookup may take longer than the connector waits for it."""


@dataclass(frozen=True, slots=True)
class Questions:
    """What every engine is asked."""

    prompts: Sequence[Prompt]
    """All of one length."""
    positions: int
    """Lengths at which each prompt is asked, evenly spaced over what is behind the reused tokens."""

    def __post_init__(self) -> None:
        """Raises ConfigurationError for prompts that are too short."""
        if self.reused_tokens < CHUNK_TOKENS or self._length - self.reused_tokens < self.positions:
            raise ConfigurationError(
                f"prompts of {self._length} tokens reuse {self.reused_tokens}, and have fewer than {self.positions} "
                "behind them; choose other `--tokens`"
            )

    @property
    def _length(self) -> int:
        return len(self.prompts[0].ids)

    @property
    def reused_tokens(self) -> int:
        """Whole chunks of each prompt; at least one token stays to be computed."""
        return (self._length - 1) // CHUNK_TOKENS * CHUNK_TOKENS

    @property
    def beginnings(self) -> list[tuple[int, ...]]:
        """What is asked: each prompt, cut at its positions."""
        step = (self._length - self.reused_tokens) // self.positions
        ends = [self._length - place * step for place in range(self.positions)]
        return [prompt.ids[:end] for prompt in self.prompts for end in ends]


def ask_cold(engine: Completions, questions: Questions) -> list[NextToken]:
    """All of each prompt is computed. Raises RequestError."""
    return [_ask_reusing(engine, ids, 0) for ids in questions.beginnings]


def ask_own_cache(engine: Completions, questions: Questions) -> list[NextToken]:
    """vLLM's own prefix cache has the reused tokens. These distributions differ from cold ones by rounding only: other
    shapes are computed. Raises RequestError."""
    reused = questions.reused_tokens
    found = []
    for ids in questions.beginnings:
        engine.forget()
        engine.complete(ids[:reused], 1, _SILENCE_S)
        found.append(_require(engine.next_token(ids, _SILENCE_S), reused))
    return found


def ask_store(engine: Completions, questions: Questions, store: Store) -> list[NextToken]:
    """The engine, whose connector loads all that is stored, stores each prompt and then loads its beginning for each
    position. Raises RequestError, also when the prompts are not reused, and ServiceError."""

    def ask(prompt: Prompt) -> Answer:
        engine.forget()
        return engine.complete(prompt.ids, 1, _SILENCE_S)

    store_prompts(ask, store, questions.prompts)
    return [_ask_reusing(engine, ids, questions.reused_tokens) for ids in questions.beginnings]


def divergence_row(cold: Sequence[NextToken], found: Sequence[NextToken]) -> dict[str, Any]:
    """{positions, reused_tokens, kl, kl_median, kl_max (of the cold distribution from the other one, nats per token),
    same_likeliest (share of the positions at which the likeliest token is that of the cold distribution)}."""
    pairs = list(zip(cold, found, strict=True))
    divergences = [kl_divergence(exact, other) for exact, other in pairs]
    same = [exact.log_probabilities.argmax() == other.log_probabilities.argmax() for exact, other in pairs]
    return {
        "positions": len(found),
        "reused_tokens": min(other.reused_tokens for other in found),
        "kl": float(np.mean(divergences)),
        "kl_median": float(np.median(divergences)),
        "kl_max": max(divergences),
        "same_likeliest": float(np.mean(same)),
    }


def kl_divergence(exact: NextToken, other: NextToken) -> float:
    """Of the distribution `exact` from the other one, over the whole vocabulary, in nats."""
    difference = exact.log_probabilities - other.log_probabilities
    return float(np.sum(np.exp(exact.log_probabilities) * difference))


def _ask_reusing(engine: Completions, ids: Sequence[int], tokens: int) -> NextToken:
    """With an empty cache of the engine's own. Raises RequestError unless so many tokens are reused."""
    for _ in range(_ATTEMPTS):
        engine.forget()
        found = engine.next_token(ids, _SILENCE_S)
        if found.reused_tokens == tokens:
            break
    return _require(found, tokens)


def _require(found: NextToken, tokens: int) -> NextToken:
    if found.reused_tokens != tokens:
        raise RequestError(f"{found.reused_tokens} tokens are reused instead of {tokens}")
    return found
