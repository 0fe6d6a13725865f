"""What a parser under test is, and what it did with one input."""

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from kvstore_bench.hostile.memory import PeakMemory

READ, MEMORY, SLOW = "read", "memory", "slow"
"""Outcomes of input that was read, that took too much memory, and too much time."""
MOST_CPU_SECONDS = 5.0
# What the allocator rounds up. Python takes memory in pieces of 1 MiB.
ROUNDING_BYTES = 4 << 20


class IgnoredError(Exception):
    """Raised in place of a reader that treats unusable bytes as missing, as it documents, and logs why."""


class WrongResultError(Exception):
    """The parser returned something that its users cannot use."""


@dataclass(frozen=True, slots=True)
class Parser:
    """A parser under test.

    `read` gives it bytes, and uses what it returns as the service does. `refusals` are the errors that it documents.
    `honest` makes inputs that it reads, among them one about as large as there are. `mutant` makes hostile ones.
    """

    name: str
    honest: Callable[[], Sequence[bytes]]
    mutant: Callable[[random.Random], bytes]
    read: Callable[[bytes], object]
    refusals: tuple[type[Exception], ...]


class Outcome(NamedTuple):
    """What a parser did with one input."""

    what: str
    """READ, MEMORY, SLOW, or the name of the error that it raised."""
    is_fault: bool
    """Whether the parser does not document that error, or took too much memory or time."""
    detail: str
    cpu_seconds: float
    memory_bytes: int


def outcome_of(parser: Parser, data: bytes, memory: PeakMemory, most_bytes: float) -> Outcome:
    """Gives the parser one input. More than `most_bytes` of memory, or MOST_CPU_SECONDS, are a fault."""
    memory.begin()
    started_s = time.process_time()
    what, is_fault, detail = READ, False, ""
    try:
        parser.read(data)
    except parser.refusals as error:
        what = type(error).__name__
    except Exception as error:  # what the run looks for
        what, is_fault, detail = type(error).__name__, True, f"{error}"[:200]
    cpu_seconds = time.process_time() - started_s
    taken_bytes = memory.taken_bytes()
    if taken_bytes > most_bytes and not is_fault:
        what, is_fault, detail = MEMORY, True, f"{what} after taking {taken_bytes} bytes"
    elif cpu_seconds > MOST_CPU_SECONDS and not is_fault:
        what, is_fault, detail = SLOW, True, f"{what} after {cpu_seconds:.1f} s"
    return Outcome(what, is_fault, detail, cpu_seconds, taken_bytes)


def honest_memory_bytes(parser: Parser, memory: PeakMemory) -> int:
    """Memory that the parser takes for the largest honest input. Raises what it raises for one that it refuses."""
    most_bytes = 0
    inputs = parser.honest()
    for data in inputs:  # libraries and caches are not what is measured
        parser.read(data)
    for data in inputs:
        memory.begin()
        parser.read(data)
        most_bytes = max(most_bytes, memory.taken_bytes())
    return most_bytes


def limit_bytes(honest_bytes: int) -> int:
    """Most memory that a parser may take for any input."""
    return 2 * honest_bytes + ROUNDING_BYTES


def random_of(run_seed: int, name: str, number: int) -> random.Random:
    """The source of randomness of one mutant. It depends on the arguments alone."""
    return random.Random(f"{run_seed}:{name}:{number}")
