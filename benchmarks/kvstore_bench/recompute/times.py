"""Measures time to first token, and throughput of a batch. Each round also measures the model without the service."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from kvstore_bench.recompute.engine import Asked, Engine
from kvstore_bench.recompute.methods import OURS, Cell
from kvstore_bench.recompute.prompts import Prompt, orders

TARGET_RATIO = 0.15
"""Recompute ratio at which methods are compared."""


@dataclass(frozen=True, slots=True)
class Race:
    """Samples of all rounds, one per cell and round."""

    asked: dict[Cell, list[Asked]]
    full_s: list[float] = field(default_factory=list)
    """Of the model without the service."""


def race(
    engine: Engine, prompt: Prompt, cells: Sequence[Cell], repeats: int, advance: Callable[[int, int], None]
) -> Race:
    """Measures each cell once per round. Each round begins with another cell. Warms up each method and the model
    first."""
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
    """Throughput of batches, prompt tokens per second."""

    of: dict[Cell, float]
    full: float
    """Of the model without the service."""


def batches(
    engine: Engine, prompt: Prompt, cells: Sequence[Cell], size: int, advance: Callable[[int, int], None]
) -> Batches:
    """Measures a batch of `size` requests: the same documents in different orders. Measures our own method at every
    ratio, the others only at `TARGET_RATIO`."""
    asked = [prompt.ordered(order) for order in orders(len(prompt.documents), size)]
    tokens = sum(one.ids.shape[1] for one in asked)
    wanted = [cell for cell in cells if cell.method.name == OURS or cell.ratio == TARGET_RATIO]
    advance(0, len(wanted) + 1)
    full_s = sum(engine.compute(one) for one in asked)
    found = {}
    for index, cell in enumerate(wanted):
        advance(index + 1, len(wanted) + 1)
        found[cell] = tokens / engine.ask_batch(asked, cell.recompute)
    # Measured before and after the batches, because the speed of the machine may change meanwhile.
    full_s = (full_s + sum(engine.compute(one) for one in asked)) / 2
    advance(len(wanted) + 1, len(wanted) + 1)
    return Batches(found, tokens / full_s)
