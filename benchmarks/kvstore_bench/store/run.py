"""Runs the benchmark of the data path: several sizes and numbers of clients, with all systems in alternation."""

import contextlib
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from kvstore_bench.store.lookup import measure_lookups
from kvstore_bench.store.processes import Process
from kvstore_bench.store.systems import SYSTEMS, Group, System
from kvstore_codec.errors import ConfigurationError, StartupError
from kvstore_service.calibration import Report

_RESIDENT_BYTES = 128 << 20
"""Size of all values of a system: much larger than processor caches, and much smaller than the memory of a server."""
_MOST_KEYS, _LEAST_KEYS = 8, 2
_ANSWER_TIMEOUT_S = 120.0


@dataclass(frozen=True, slots=True)
class Options:
    sizes: Sequence[int]
    """Of a value, bytes."""
    clients: Sequence[int]
    """Numbers of concurrent clients."""
    systems: Sequence[str]
    seconds: float
    """Length of one measurement."""
    rounds: int


@dataclass(frozen=True, slots=True)
class Result:
    rows: list[dict[str, Any]]
    left_out: list[str]
    """Reasons why requested systems have no rows."""


def run(options: Options, report: Report) -> Result:
    """Runs the benchmark. Raises ConfigurationError for an unknown system, StartupError when one of this project's own
    systems fails."""
    unknown = set(options.systems) - {system.name for system in SYSTEMS}
    if unknown:
        raise ConfigurationError(
            f"there is no system {', '.join(sorted(unknown))}; systems are {', '.join(s.name for s in SYSTEMS)}"
        )
    left_out: list[str] = []
    systems: list[System] = []
    for system in (system for system in SYSTEMS if system.name in options.systems):
        if system.is_installed:
            systems.append(system)
        else:
            left_out.append(f"{system.name} is not installed; to install it: {system.install}")
    for note in left_out:
        report.note(note)
    with contextlib.ExitStack() as stack:
        bench = _Bench(options, stack, report, left_out)
        bench.start(systems)
        return Result(bench.rows(), left_out)


class _Bench:
    def __init__(
        self, options: Options, stack: contextlib.ExitStack, report: Report, left_out: list[str]
    ) -> None:
        self._options = options
        self._stack = stack
        self._report = report
        self._left_out = left_out
        self._systems: list[System] = []
        self._clients: dict[str, list[Process]] = {}  # by group
        self._addresses: dict[str, str] = {}

    def start(self, systems: Sequence[System]) -> None:
        """Starts all processes at once, because each needs seconds for its imports."""
        self._systems = list(systems)
        groups = {system.group.name: system.group for system in systems}
        servers = {name: self._started(name, group.server) for name, group in groups.items()}
        for index, (name, server) in enumerate(servers.items()):
            self._report.advance("start", index, len(servers))
            with self._failure_of(groups[name]):
                self._addresses[name] = server.line()
        for name, address in self._addresses.items():
            command = (*groups[name].client, address)
            self._clients[name] = [self._started(name, command) for _ in range(max(self._options.clients))]
        self._report.advance("start", len(servers), len(servers))

    def rows(self) -> list[dict[str, Any]]:
        """Measures all combinations. Returns their rows."""
        rows: list[dict[str, Any]] = []
        steps = [(clients, size) for clients in self._options.clients for size in self._options.sizes]
        for index, (clients, size_bytes) in enumerate(steps):
            self._report.advance("measure", index, len(steps))
            rows.extend(self._measure(clients, size_bytes))
        self._report.advance("measure", len(steps), len(steps))
        if any(system.group.name == "kvstore" for system in self._systems):
            rows.extend(measure_lookups(self._addresses["kvstore"], self._options.rounds))
        return rows

    def _measure(self, clients: int, size_bytes: int) -> list[dict[str, Any]]:
        """Measures every system once per round. Each round begins with another system."""
        keys = min(_MOST_KEYS, max(_LEAST_KEYS, _RESIDENT_BYTES // (size_bytes * clients)))
        for group in self._groups():
            with self._failure_of(group):
                for index, client in enumerate(self._clients[group.name][:clients]):
                    first = 100 * index
                    client.tell("resident", size_bytes=size_bytes, keys=list(range(first, first + keys)))
                self._answers(group, clients)
        rounds: dict[tuple[str, str], list[list[list[float]]]] = {}
        for number in range(self._options.rounds):
            turn = number % max(1, len(self._systems))
            for op in ("get", "put", "get+verify"):
                for system in (*self._systems[turn:], *self._systems[:turn]):
                    if op in system.methods and system in self._systems:
                        with self._failure_of(system.group):
                            times = self._time(system, system.methods[op], clients)
                            rounds.setdefault((system.name, op), []).append(times)
        for command in ("check", "forget"):
            for group in self._groups():
                with self._failure_of(group):
                    for client in self._clients[group.name][:clients]:
                        client.tell(command)
                    self._answers(group, clients)
        kept = {system.name for system in self._systems}
        return [
            _row(system, op, size_bytes, clients, measured)
            for (system, op), measured in rounds.items()
            if system in kept
        ]

    def _time(self, system: System, method: str, clients: int) -> list[list[float]]:
        for client in self._clients[system.group.name][:clients]:
            client.tell("time", method=method, seconds=self._options.seconds)
        return self._answers(system.group, clients)

    def _answers(self, group: Group, clients: int) -> list[Any]:
        return [client.answer(_ANSWER_TIMEOUT_S) for client in self._clients[group.name][:clients]]

    def _groups(self) -> list[Group]:
        return list({system.group.name: system.group for system in self._systems}.values())

    def _started(self, name: str, command: Sequence[str]) -> Process:
        process = Process(name, command)
        self._stack.callback(process.close)
        return process

    @contextlib.contextmanager
    def _failure_of(self, group: Group) -> Iterator[None]:
        """Excludes a peer that fails from the rest of the run. Raises StartupError for a system of this project."""
        try:
            yield
        except StartupError as error:
            failed = [system for system in self._systems if system.group == group]
            if not all(system.install for system in failed):
                raise
            self._systems = [system for system in self._systems if system.group != group]
            self._left_out.append(f"{group.name} failed: {error}")
            self._report.note(self._left_out[-1])


def _row(
    system: str, op: str, size_bytes: int, clients: int, rounds: Sequence[Sequence[Sequence[float]]]
) -> dict[str, Any]:
    """Row of one system. `rounds` has the seconds of each operation, by round and client. Clients run concurrently, so
    their rates add up."""
    rates = [sum(size_bytes * len(times) / sum(times) for times in clients_) / 1e9 for clients_ in rounds]
    times_ms = sorted(1000 * took_s for clients_ in rounds for times in clients_ for took_s in times)
    return {
        "system": system,
        "op": op,
        "size_bytes": size_bytes,
        "clients": clients,
        "GBps": statistics.median(rates),
        "GBps_min": min(rates),
        "GBps_max": max(rates),
        "p50_ms": statistics.median(times_ms),
        "p99_ms": times_ms[min(len(times_ms) - 1, int(0.99 * len(times_ms)))],
        "operations": len(times_ms),
    }
