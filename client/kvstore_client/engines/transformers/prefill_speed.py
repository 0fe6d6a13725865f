"""Measures how long a model's forward passes take."""

import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from transformers import DynamicCache, PreTrainedModel

from kvstore_client.planning.prefill_fit import TimedPass, fit
from kvstore_client.planning.profile import PrefillCost

LONG_TOKENS = 1024
_PATIENCE_S = 5.0
"""A pass over LONG_TOKENS that takes longer is not measured; a pass over a quarter of the tokens is enough."""

_ROUNDS = 3
_ENOUGH_PASSES, _ENOUGH_S = 3, 3.0
"""Measuring stops after this many different passes that took this many seconds together."""

_WORDS = 4096
"""Vocabulary of the sample text: the first token ids are the most frequent ones."""


@dataclass(frozen=True, slots=True)
class Pass:
    """A timed forward pass."""

    first_token: int
    tokens: int
    seconds: float

    @property
    def timed(self) -> TimedPass:
        return TimedPass(self.tokens, self.tokens * (self.first_token + self.tokens / 2), self.seconds)


class PrefillSpeed:
    """Runs and times forward passes of `model` over a sample text. Use it in inference mode."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model, self._decoder = model, model.get_decoder()
        config = model.config.get_text_config()
        longest = int(config.max_position_embeddings)
        self.text = sample_text(min(2 * LONG_TOKENS, longest), int(config.vocab_size)).to(model.device)
        few = min(64, longest // 2)
        self.timed(DynamicCache(), few)  # the first pass allocates and compiles
        warm = self.timed(DynamicCache(), few)
        patient = warm.seconds * LONG_TOKENS / few < _PATIENCE_S
        self.long_tokens = min(LONG_TOKENS if patient else LONG_TOKENS // 4, longest // 2)

    def timed(self, cache: DynamicCache, tokens: int) -> Pass:
        """Time the next `tokens` tokens of the text, behind those in `cache`."""
        first = cache.get_seq_length()
        begin_s = time.perf_counter()
        self._decoder(self.text[None, first : first + tokens], past_key_values=cache, use_cache=True)
        if self._model.device.type == "cuda":
            torch.cuda.synchronize(self._model.device)
        return Pass(first, tokens, time.perf_counter() - begin_s)

    def measure(self) -> PrefillCost:
        """Costs from the fastest passes of three lengths, with and without preceding tokens."""
        lengths = (max(1, self.long_tokens // 32), max(1, self.long_tokens // 4), self.long_tokens)
        found: dict[tuple[int, int], Pass] = {}
        begin_s = time.perf_counter()
        for one in self._rounds(lengths):
            place = one.first_token, one.tokens
            found[place] = min(one, found.get(place, one), key=lambda other: other.seconds)
            if len(found) >= _ENOUGH_PASSES and time.perf_counter() - begin_s > _ENOUGH_S:
                break
        return fit([one.timed for one in found.values()])

    def _rounds(self, lengths: tuple[int, int, int]) -> Iterator[Pass]:
        few, short, long = lengths
        for _ in range(_ROUNDS):
            yield self.timed(DynamicCache(), short)
            cache = DynamicCache()
            yield self.timed(cache, long)
            yield self.timed(cache, short)
            cache.crop(-short)
            yield self.timed(cache, few)
            yield self.timed(DynamicCache(), few)


def sample_text(tokens: int, vocabulary: int) -> torch.Tensor:
    """Token ids, i64 `[tokens]`, with properties of text: a few frequent words (Zipf) and repeated phrases."""
    random = np.random.default_rng(0)
    words = min(_WORDS, vocabulary)
    frequent = random.permutation(words)
    ids = frequent[np.minimum(random.zipf(1.3, tokens), words) - 1]
    for begin in range(64, tokens - 8, 24):
        again = int(random.integers(0, begin - 8))
        ids[begin : begin + 8] = ids[again : again + 8]
    return torch.from_numpy(ids.astype(np.int64))
