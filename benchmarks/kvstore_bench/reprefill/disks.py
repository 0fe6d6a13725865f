"""Disks of the benchmark: rates of real ones, and rates at which a system's reads and its computation balance."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kvstore_bench.reprefill.systems import Asked
from kvstore_codec.errors import ConfigurationError

RATES_Bps: dict[str, float | None] = {"unthrottled": None, "nvme": 3.5e9, "ssd": 550e6, "hdd": 160e6}
"""By name; None: as fast as this machine's disk."""


@dataclass(frozen=True, slots=True)
class Balance:
    """A disk whose rate follows from a system's own speed."""

    system: str
    waiting: float | None
    """Share of the time that the model waits for the disk. None: reading takes as long as computing, at once."""


BALANCES = {
    # ContiguousKV's evaluation: IMPRESS spends 65 to 75 % of its time in I/O.
    "balanced": Balance("impress", 0.7),
    "even": Balance("contiguous", None),
}
DISKS = (*RATES_Bps, *BALANCES)
_CLOSE_ENOUGH = 0.025
_TRIES = 3

Ask = Callable[[float | None], Sequence[Asked]]
"""Asks all questions on a disk of this rate, bytes/s, with empty caches."""


def require_disks(names: Sequence[str]) -> None:
    """Raises ConfigurationError for a disk that is not known."""
    for name in names:
        if name not in DISKS:
            raise ConfigurationError(f"there is no disk {name!r}; disks are {', '.join(DISKS)}")


def balanced_rate(balance: Balance, ask: Ask) -> float:
    """The rate at which the balance holds, bytes/s, found by measuring. The last of a few tries counts, so read from
    the rows how well it holds."""
    asked = ask(None)
    read_bytes = statistics.fmean(one.bytes_read for one in asked)
    if balance.waiting is None:
        return read_bytes / _computing_s(asked)
    per_computing = balance.waiting / (1 - balance.waiting)
    rate = read_bytes / (_computing_s(asked) * per_computing)
    for _ in range(_TRIES):
        asked = ask(rate)
        if (
            abs(statistics.fmean(one.waited_s / one.ttft_s for one in asked) - balance.waiting)
            < _CLOSE_ENOUGH
        ):
            break
        waited_s = statistics.median(one.waited_s for one in asked)
        rate *= waited_s / (_computing_s(asked) * per_computing)
    return rate


def _computing_s(asked: Sequence[Asked]) -> float:
    # The median, because on a busy machine a few questions take several times as long.
    return statistics.median(one.ttft_s - one.waited_s for one in asked)
