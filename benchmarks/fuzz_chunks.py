"""Fuzz the chunk decoder: decode mutants of every encoding, with correct checksums, twice each.

    nice -n 19 python benchmarks/fuzz_chunks.py --mutants 1000000 --processes 2 --json F

A mutant must not decode differently the second time, raise an exception that is not the project's own, kill its
process, hang, or use too much memory. Mutants that do are written into the folder `--save`, and the exit code is 1.
`--seed` and the number in a file's name reproduce its mutant. Rows: {encoding, kind, mutants, refused, sound, other_kv,
refused_once, decoded_differently, foreign_exceptions}; `Kind` and `Verdict` are documented in
`benchmarks/kvstore_bench/fuzz`."""

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
from kvstore_bench.fuzz.judge import Verdict
from kvstore_bench.fuzz.run import Tally, fuzz
from kvstore_bench.output_options import JsonFile

_COLUMNS = {
    "refused": Verdict.REFUSED,
    "sound": Verdict.SOUND,
    "other_kv": Verdict.OTHER,
    "refused_once": Verdict.UNSTEADY,
    "decoded_differently": Verdict.DIFFERENT,
    "foreign_exceptions": Verdict.FOREIGN,
}
_MOST_GROWTH = 2.0
"""Largest factor by which a worker's memory may grow."""


def main(
    mutants: Annotated[int, typer.Option(min=1, help="Number of mutants.")] = 100_000,
    processes: Annotated[int, typer.Option(min=1, help="Number of worker processes.")] = 2,
    seed: Annotated[int, typer.Option(help="Seed; each makes other mutants.")] = 14,
    save: Annotated[Path, typer.Option(help="Folder for mutants that reveal a fault.")] = Path("fuzz-faults"),
    json_file: JsonFile = None,
) -> None:
    """Fuzz the chunk decoder: decode mutants of every encoding, with correct checksums, twice each."""
    tally, started_s = Tally(), time.monotonic()
    columns = TextColumn("mutants"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("", total=mutants)
        try:
            for part in fuzz(seed, mutants, processes, save):
                tally.merge(part)
                progress.advance(task, part.mutants + part.unjudged)
        except KeyboardInterrupt:
            Console(stderr=True).print("interrupted; the results so far:")
    rows = _rows(tally)
    summary = {
        "mutants": tally.mutants,
        "seed": seed,
        "processes": processes,
        "seconds": round(time.monotonic() - started_s, 1),
        **{name: sum(row[name] for row in rows) for name in _COLUMNS},
        "crashes": tally.count("crash"),
        "hangs": tally.count("hang"),
        "slowest_decode_ms": round(tally.slowest_s * 1e3, 1),
        "rss_start_bytes": tally.rss_start_bytes,
        "rss_peak_bytes": tally.rss_peak_bytes,
        "rss_growth": round(tally.rss_peak_bytes / max(1, tally.rss_start_bytes), 3),
    }
    _print(rows, summary)
    write_results(rows, json_file, summary)
    for fault in tally.faults[:20]:
        print(f"{fault.what}: mutant {fault.number}, {fault.kind} of {fault.encoding}: {fault.detail}")
    sys.exit(1 if tally.faults or summary["rss_growth"] > _MOST_GROWTH else 0)


def _rows(tally: Tally) -> list[dict[str, Any]]:
    groups = sorted({(encoding, kind) for encoding, kind, _ in tally.verdicts})
    return [
        {
            "encoding": encoding,
            "kind": str(kind),
            "mutants": sum(tally.verdicts[encoding, kind, verdict] for verdict in Verdict),
            **{name: tally.verdicts[encoding, kind, verdict] for name, verdict in _COLUMNS.items()},
        }
        for encoding, kind in groups
    ]


def _print(rows: list[dict[str, Any]], summary: dict[str, Any]) -> None:
    table = Table("encoding", "mutants", *_COLUMNS)
    for encoding in dict.fromkeys(row["encoding"] for row in rows):
        of_encoding = [row for row in rows if row["encoding"] == encoding]
        sums = (sum(row[name] for row in of_encoding) for name in ("mutants", *_COLUMNS))
        table.add_row(encoding, *(f"{number:,}" for number in sums))
    Console(width=140).print(table)
    print(", ".join(f"{name} {value}" for name, value in summary.items()))


if __name__ == "__main__":
    typer.run(main)
