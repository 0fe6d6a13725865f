"""The search on one tier, against a machine whose times are known."""

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch

from kvstore_bench.recompute.engine import Asked
from kvstore_bench.recompute.prompts import Prompt
from kvstore_bench.recompute.tiers import tiers_named
from kvstore_bench.tuning.rounds import Rounds
from kvstore_bench.tuning.tiers import TIERS
from kvstore_bench.tuning.tune import MOST_RATIO, TunedTier, tune
from kvstore_client.recompute import Recompute
from kvstore_client.recompute.tuning import LEAST_RATIO, TOLERANCE
from kvstore_codec.errors import ConfigurationError

DOCUMENTS, REST = 1024, 76
COMPUTE_S = 1e-3


class Machine:
    """Answers after T(r), and grows slower from one answer to the next."""

    def __init__(self, transfer_s: float, slower: float = 0.0) -> None:
        self._transfer_s, self._slower, self._pace = transfer_s, slower, 1.0
        self.asked: list[tuple[int, float | None]] = []
        """Which prompt (its question's only token), at which ratio; None: everything computed."""

    def ask(self, prompt: Prompt, recompute: Recompute) -> Asked:
        self.asked.append((int(prompt.question[0]), recompute.ratio))
        assert (recompute.selector, recompute.drift) == ("first_k", False)
        ttft_s = max(
            recompute.ratio * DOCUMENTS * COMPUTE_S, (1 - recompute.ratio) * DOCUMENTS * self._transfer_s
        )
        receive_s = (1 - recompute.ratio) * DOCUMENTS * self._transfer_s
        return Asked(ttft_s * self._passes(), 0, receive_s, 0, 0, 0)

    def compute(self, prompt: Prompt) -> float:
        self.asked.append((int(prompt.question[0]), None))
        return prompt.ids.shape[1] * COMPUTE_S * self._passes()

    def _passes(self) -> float:
        self._pace *= 1 + self._slower
        return self._pace


def prompt(number: int) -> Prompt:
    system, document = torch.zeros(REST - 1, dtype=torch.int64), torch.zeros(512, dtype=torch.int64)
    return Prompt("timed", "none", system, (document, document), torch.tensor([number]))


def rounds_on(machine: Machine, repeats: int = 2) -> Rounds:
    recompute = Recompute("first_k", drift=False)
    return Rounds(machine, [prompt(0), prompt(1)], recompute, repeats)  # type: ignore[arg-type]


def tuned_on(
    machine: Machine, sweep: int = 0, advance: Callable[[int, int], None] | None = None
) -> TunedTier:
    return tune(rounds_on(machine), sweep, advance or _silently, _silently)


def _silently(done: int, total: int) -> None:
    assert done <= total


@pytest.mark.parametrize("transfer_s", [1e-5, 0.2e-3, 0.5e-3, 1e-3, 1.0])
@pytest.mark.parametrize("slower", [0.0, 0.002])
def test_finds_the_balance_on_a_machine_that_grows_slower(transfer_s: float, slower: float) -> None:
    found = tuned_on(Machine(transfer_s, slower))
    balance = min(max(transfer_s / (COMPUTE_S + transfer_s), LEAST_RATIO), MOST_RATIO)
    assert found.tuned.ratio == pytest.approx(balance, abs=TOLERANCE)
    assert found.first == pytest.approx(balance, abs=0.02)
    assert found.costs.transfer_s == pytest.approx(transfer_s)
    assert found.costs.compute_s == pytest.approx(COMPUTE_S, rel=20 * slower + 1e-6)
    assert found.costs.full_ttft_s == pytest.approx((DOCUMENTS + REST) * found.costs.compute_s)


def test_the_sweep_is_evenly_spaced_and_says_how_far_off_the_tuned_one_is() -> None:
    found = tuned_on(Machine(0.25e-3), sweep=10)
    ratios = [ratio for ratio, _ in found.sweep]
    assert (len(ratios), ratios[0], ratios[-1]) == (10, LEAST_RATIO, pytest.approx(MOST_RATIO))
    assert {round(b - a, 9) for a, b in pairwise(ratios)} == {0.05}
    assert found.best == (pytest.approx(0.2), pytest.approx(0.2 * DOCUMENTS * COMPUTE_S))
    assert found.ttft_s == pytest.approx(0.2 * DOCUMENTS * COMPUTE_S, rel=0.06)
    assert tuned_on(Machine(0.25e-3)).best is None


def test_ways_take_turns_and_each_goes_first() -> None:
    machine = Machine(0.25e-3)
    rounds_on(machine).mean_ttfts_s([0.2, 0.4])
    assert machine.asked == [
        (0, 0.2), (0, 0.4), (1, 0.4), (1, 0.2),
        (0, 0.4), (0, 0.2), (1, 0.2), (1, 0.4),
    ]  # fmt: skip


def test_no_ratio_is_searched_twice_and_progress_ends_at_its_end() -> None:
    machine = Machine(0.25e-3)
    seen: list[tuple[int, int]] = []
    found = tuned_on(machine, advance=lambda done, total: seen.append((done, total)))
    measured = [ratio for ratio, _ in found.tuned.measurements]
    assert len(measured) == len(set(measured)) == seen[-1][0] == seen[-1][1]
    assert all(done <= total for done, total in seen)
    assert all(a[0] <= b[0] for a, b in pairwise(seen))


def test_tiers_are_measured_memory_first() -> None:
    assert [tier.name for tier in tiers_named(["disk", "hdd", "dram"], TIERS)] == ["dram", "hdd", "disk"]
    with pytest.raises(ConfigurationError, match="no tier 'tape'"):
        tiers_named(["dram", "tape"], TIERS)
    with pytest.raises(ConfigurationError, match="nothing to measure"):
        tiers_named([], TIERS)
