"""The engine's speed from its steps; the steps are those of vLLM's SchedulerOutput."""

from types import SimpleNamespace
from typing import Any

import pytest

from kvstore_client.engines.vllm.step_times import StepTimes
from kvstore_client.planning import PrefillCost
from tests.clock import Clock

COST = PrefillCost(0.02, 5e-4, 1e-7)


class Engine:
    """Takes as long for each step as COST says."""

    def __init__(self, slower: float = 1.0) -> None:
        self.clock, self.slower = Clock(0.0), slower
        self.times = StepTimes(self.clock)
        self.steps = 0

    def seconds(self, pieces: list[tuple[int, int]]) -> float:
        tokens, pairs = sum(t for _, t in pieces), sum(t * (f + t / 2) for f, t in pieces)
        return self.slower * (COST.fixed_s + COST.per_token_s * tokens + COST.per_pair_s * pairs)

    def schedule(self, *pieces: tuple[int, int], new: int = 0) -> int:
        """A step of requests `(computed tokens, scheduled tokens)`; the first `new` ones are new to the engine."""
        self.steps += 1
        self.times.began(self.steps, scheduled(list(pieces), new))
        return self.steps

    def run(self, *pieces: tuple[int, int], new: int = 0) -> None:
        step = self.schedule(*pieces, new=new)
        self.clock.now_s += self.seconds(list(pieces))
        self.times.ended(step)


def scheduled(pieces: list[tuple[int, int]], new: int) -> Any:
    names = [f"request {index}" for index in range(len(pieces))]
    return SimpleNamespace(
        scheduled_new_reqs=[
            SimpleNamespace(req_id=name, num_computed_tokens=first)
            for name, (first, _) in list(zip(names, pieces, strict=True))[:new]
        ],
        scheduled_cached_reqs=SimpleNamespace(
            req_ids=names[new:], num_computed_tokens=[first for first, _ in pieces[new:]]
        ),
        num_scheduled_tokens={name: tokens for name, (_, tokens) in zip(names, pieces, strict=True)},
    )


def check(engine: Engine, slower: float = 1.0) -> None:
    assert engine.times.prefill is not None
    for first, tokens in ((0, 2000), (1792, 256), (3000, 1000)):
        wanted = slower * COST.seconds(first, tokens)
        assert engine.times.prefill.seconds(first, tokens) == pytest.approx(wanted, rel=0.15)


def test_nothing_is_known_before_a_prompt_was_computed() -> None:
    engine = Engine()
    assert engine.times.prefill is None
    engine.run((0, 2000), new=1)
    assert engine.times.prefill is not None


def test_steps_of_prompts_tell_the_cost() -> None:
    engine = Engine()
    for _ in range(4):
        engine.run((0, 2000), new=1)
        engine.run((1792, 200), new=1)
        engine.run((0, 512), (0, 512), new=2)
        engine.run((0, 2048), new=1)
        engine.run((2048, 2048))
        engine.run((4096, 1000), (100, 1), (3000, 1))
    check(engine)


def test_steps_that_only_generate_teach_nothing() -> None:
    engine = Engine()
    for _ in range(4):
        engine.run((0, 2000), new=1)
    known = engine.times.prefill
    engine.slower = 100.0
    for step in range(200):
        engine.run((2000 + step, 1), (500 + step, 1))
    assert engine.times.prefill == known


def test_the_engine_may_schedule_ahead() -> None:
    """The next step is scheduled while the one before it is computed."""
    engine = Engine()
    kinds = [(0, 2000), (1792, 200), (2048, 2048), (0, 300)] * 4
    waiting: list[tuple[int, tuple[int, int]]] = []
    for piece in kinds:
        waiting.append((engine.schedule(piece), piece))
        if len(waiting) == 2:
            step, done = waiting.pop(0)
            engine.clock.now_s += engine.seconds([done])
            engine.times.ended(step)
    check(engine)


def test_an_engine_that_becomes_slower_is_noticed() -> None:
    engine = Engine()
    kinds = [(0, 2000), (1792, 200), (2048, 2048), (0, 300)]
    for piece in kinds * 8:
        engine.run(piece)
    check(engine)
    engine.slower = 3.0
    for piece in kinds * 16:
        engine.run(piece)
    check(engine, 3.0)


def test_a_pause_between_steps_is_no_part_of_them() -> None:
    engine = Engine()
    for piece in [(0, 2000), (1792, 200), (2048, 2048), (0, 300)] * 4:
        engine.clock.now_s += 7.0
        engine.run(piece)
    check(engine)


def test_a_step_whose_end_is_never_told_is_forgotten() -> None:
    engine = Engine()
    for _ in range(1000):
        engine.schedule((0, 2000), new=1)
    assert len(engine.times._open) <= 16
    engine.times.ended(1)
    assert engine.times.prefill is None
