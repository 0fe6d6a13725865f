"""Measures seconds to the first token in alternating rounds, so that other load on the machine affects all ratios
alike."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from kvstore_bench.recompute.engine import Engine
from kvstore_bench.recompute.prompts import Prompt
from kvstore_client.recompute import Recompute


@dataclass(frozen=True, slots=True)
class Costs:
    """Seconds per token, and seconds of a whole prompt without reuse."""

    compute_s: float
    transfer_s: float
    full_ttft_s: float


class Rounds:
    """Repeats the same prompts with stored documents. `recompute` gives all parameters except the ratio."""

    def __init__(self, engine: Engine, prompts: Sequence[Prompt], recompute: Recompute, repeats: int) -> None:
        self._engine, self._prompts = engine, prompts
        self._recompute, self._repeats = recompute, repeats

    def warm_up(self) -> None:
        """Runs each prompt once, so that one-time costs are not measured."""
        self._full_ttft_s(self._prompts[0])
        for prompt in self._prompts:
            self._ttft_s(prompt, self._recompute.ratio)

    def mean_ttfts_s(self, ratios: Sequence[float]) -> list[float]:
        """Seconds to the first token for each ratio, mean over the prompts."""
        return self._mean([lambda prompt, ratio=ratio: self._ttft_s(prompt, ratio) for ratio in ratios])  # type: ignore[misc]

    def costs(self) -> Costs:
        """The costs of computing everything and of fetching everything."""
        prompt = self._prompts[0]

        def transfer_s(asked: Prompt) -> float:
            return self._engine.ask(asked, replace(self._recompute, ratio=0.0)).receive_s

        full_s, received_s = self._mean([self._full_ttft_s, transfer_s])
        return Costs(full_s / prompt.ids.shape[1], received_s / prompt.document_tokens, full_s)

    def _mean(self, ways: Sequence[Callable[[Prompt], float]]) -> list[float]:
        """Mean over prompts of each way's median. The ways take turns in going first. The median leaves out pauses of
        the machine."""
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
