"""Seconds to the first token, and what a batch comes to; the plain model takes part in every round."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from kvstore_bench.recompute.engine import Asked, Engine
from kvstore_bench.recompute.methods import OURS, Cell
from kvstore_bench.recompute.prompts import Prompt, orders

TARGET_RATIO = 0.15
"""Where methods are compared."""


@dataclass(frozen=True, slots=True)
class Race:
    """One sample of each round."""

    asked: dict[Cell, list[Asked]]
    full_s: list[float] = field(default_factory=list)
    """The plain model, computing everything."""


def race(
    engine: Engine, prompt: Prompt, cells: Sequence[Cell], repeats: int, advance: Callable[[int, int], None]
) -> Race:
    """Each cell in turn, beginning with another one in every round. What is done for the first time is done before."""
    for cell in {cell.method: cell for cell in cells if cell.ratio < 1}.values():
        engine.ask(prompt, cell.recompute)
    engine.compute(prompt)
    measured = Race({cell: [] for cell in cells})
    for number in range(repeats):
        advance(number, repeats)
        measured.full_s.append(engine.compute(prompt))
        turn = number * len(cells) // repeats
        for cell in (*cells[turn:], *cells[:turn]):
            measured.asked[cell].append(engine.ask(prompt, cell.recompute))
    advance(repeats, repeats)
    return measured


@dataclass(frozen=True, slots=True)
class Batches:
    """Prompt tokens a second."""

    of: dict[Cell, float]
    full: float


def batches(
    engine: Engine, prompt: Prompt, cells: Sequence[Cell], size: int, advance: Callable[[int, int], None]
) -> Batches:
    """The same documents in `size` orders, asked at once; of our own method at every ratio, of the others where they
    are compared."""
    asked = [prompt.ordered(order) for order in orders(len(prompt.documents), size)]
    tokens = sum(one.ids.shape[1] for one in asked)
    wanted = [cell for cell in cells if cell.method.name == OURS or cell.ratio == TARGET_RATIO]
    advance(0, len(wanted) + 1)
    full_s = sum(engine.compute(one) for one in asked)
    found = {}
    for index, cell in enumerate(wanted):
        advance(index + 1, len(wanted) + 1)
        found[cell] = tokens / engine.ask_batch(asked, cell.recompute)
    # The machine may have changed meanwhile.
    full_s = (full_s + sum(engine.compute(one) for one in asked)) / 2
    advance(len(wanted) + 1, len(wanted) + 1)
    return Batches(found, tokens / full_s)
