"""Seconds to the first token, measured in turns: what the machine does meanwhile happens to all alike."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from kvstore_bench.recompute.engine import Engine
from kvstore_bench.recompute.prompts import Prompt
from kvstore_client.recompute import Recompute


@dataclass(frozen=True, slots=True)
class Costs:
    """What a token takes, in seconds, and a whole prompt without reuse."""

    compute_s: float
    transfer_s: float
    full_ttft_s: float


class Rounds:
    """The same prompts again and again, with what is stored where it is. `recompute` says all but the ratio."""

    def __init__(self, engine: Engine, prompts: Sequence[Prompt], recompute: Recompute, repeats: int) -> None:
        self._engine, self._prompts = engine, prompts
        self._recompute, self._repeats = recompute, repeats

    def warm_up(self) -> None:
        """What is done for the first time, is done here."""
        self._full_ttft_s(self._prompts[0])
        for prompt in self._prompts:
            self._ttft_s(prompt, self._recompute.ratio)

    def mean_ttfts_s(self, ratios: Sequence[float]) -> list[float]:
        """Of each ratio: the prompts' mean."""
        return self._mean([lambda prompt, ratio=ratio: self._ttft_s(prompt, ratio) for ratio in ratios])  # type: ignore[misc]

    def costs(self) -> Costs:
        """Of computing everything, and of fetching everything."""
        prompt = self._prompts[0]

        def transfer_s(asked: Prompt) -> float:
            return self._engine.ask(asked, replace(self._recompute, ratio=0.0)).receive_s

        full_s, received_s = self._mean([self._full_ttft_s, transfer_s])
        return Costs(full_s / prompt.ids.shape[1], received_s / prompt.document_tokens, full_s)

    def _mean(self, ways: Sequence[Callable[[Prompt], float]]) -> list[float]:
        """Each way goes first in some rounds. Of a prompt the median counts: a pause of the machine is no cost."""
        seconds: list[list[list[float]]] = [[[] for _ in self._prompts] for _ in ways]
        for number in range(self._repeats):
            for index, prompt in enumerate(self._prompts):
                first = number + index
                for turn in range(len(ways)):
                    way = (first + turn) % len(ways)
                    seconds[way][index].append(ways[way](prompt))
        return [statistics.fmean(map(statistics.median, of_way)) for of_way in seconds]

    def _ttft_s(self, prompt: Prompt, ratio: float) -> float:
        return self._engine.ask(prompt, replace(self._recompute, ratio=ratio)).ttft_s

    def _full_ttft_s(self, prompt: Prompt) -> float:
        return self._engine.compute(prompt)
