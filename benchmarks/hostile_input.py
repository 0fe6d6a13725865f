"""Give every parser hostile input with right checksums, and count what it does.

    python benchmarks/hostile_input.py --mutants 200000 --json F
    python benchmarks/hostile_input.py --mutants 200000 --parser catalogue --parser disk-tier

Each mutant must be read, or refused with an error that the parser documents. Any other exception, a process that dies,
more than 5 s of a processor, and more than twice the memory of the largest honest input (and 4 MiB that the allocator
rounds up) are faults: they are printed, and the exit code is 1. A long run can be made in pieces: `--first` is the
number of the first mutant, and the rows of F count those before it, too. `--seed` and a mutant's number reproduce it.
Rows: {parser, mutants, read, refused, foreign_exceptions, crashes, hangs, too_much_memory, slowest_ms (of a processor),
honest_bytes, most_bytes, refusals by error}."""

import json
import signal
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from kvstore_bench import write_results
from kvstore_bench.hostile.run import Fault, Tally, judged
from kvstore_bench.hostile.table import PARSERS
from kvstore_bench.output_options import JsonFile

_COUNTS = ("mutants", "read", "refused", "foreign_exceptions", "crashes", "hangs", "too_much_memory")
_LARGEST = ("slowest_ms", "honest_bytes", "most_bytes")


def main(
    mutants: Annotated[int, typer.Option(min=1, help="Number of mutants of each parser.")] = 10_000,
    parser: Annotated[list[str] | None, typer.Option(help="Parser; may be repeated. All by default.")] = None,
    first: Annotated[int, typer.Option(min=0, help="Number of the first mutant.")] = 0,
    processes: Annotated[int, typer.Option(min=1, help="Number of worker processes.")] = 2,
    seed: Annotated[int, typer.Option(help="Seed; each makes other mutants.")] = 14,
    json_file: JsonFile = None,
) -> None:
    """Give every parser hostile input with right checksums, and count what it does."""
    names = parser or list(PARSERS)
    if unknown := [name for name in names if name not in PARSERS]:
        raise typer.BadParameter(f"there is no parser {unknown[0]}; known are {', '.join(PARSERS)}")
    rows = {row["parser"]: row for row in _earlier(json_file)}
    started_s, faults = time.monotonic(), list[tuple[str, Fault]]()
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with Progress(*columns, console=Console(stderr=True)) as progress:
        try:
            for name in names:
                tally = Tally()
                task = progress.add_task(name, total=mutants)
                try:
                    for part in judged(name, seed, range(first, first + mutants), processes):
                        tally.merge(part)
                        progress.advance(task, part.mutants)
                finally:
                    rows[name] = _joined(rows.get(name) if first else None, tally.row(name))
                    faults += [(name, fault) for fault in tally.faults]
        except KeyboardInterrupt:
            Console(stderr=True).print("interrupted; the results so far:")
    _print([rows[name] for name in names if name in rows])
    seconds = round(time.monotonic() - started_s, 1)
    write_results(list(rows.values()), json_file, {"seed": seed, "processes": processes, "seconds": seconds})
    for name, fault in faults[:20]:
        print(f"{name}, mutant {fault.number}: {fault.what}: {fault.detail}")
    sys.exit(1 if faults else 0)


def _earlier(json_file: Path | None) -> list[dict[str, Any]]:
    """The rows of the parsers that the file has."""
    if json_file is None or not json_file.exists():
        return []
    rows: list[dict[str, Any]] = json.loads(json_file.read_text())["rows"]
    return rows


def _joined(earlier: dict[str, Any] | None, row: dict[str, Any]) -> dict[str, Any]:
    """One row of two pieces of a run."""
    if earlier is None:
        return row
    names = sorted({*earlier["refusals"], *row["refusals"]})
    return (
        row
        | {name: earlier[name] + row[name] for name in _COUNTS}
        | {name: max(earlier[name], row[name]) for name in _LARGEST}
        | {
            "refusals": {
                name: earlier["refusals"].get(name, 0) + row["refusals"].get(name, 0) for name in names
            }
        }
    )


def _print(rows: list[dict[str, Any]]) -> None:
    table = Table("parser", *_COUNTS, "slowest, ms", "memory, MiB", "honest, MiB")
    for row in rows:
        sizes = (f"{row[name] / 2**20:.1f}" for name in ("most_bytes", "honest_bytes"))
        table.add_row(
            row["parser"], *(f"{row[name]:,}" for name in _COUNTS), f"{row['slowest_ms']:,}", *sizes
        )
    Console(width=160).print(table)


if __name__ == "__main__":
    typer.run(main)
