"""`kvstore bench faults`: parses the options, runs the benchmark, shows and writes its result."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvstore_bench.cli.tables import (
    require_outputs,
    require_packages,
    result_table,
)
from kvstore_bench.output_options import JsonFile, plot_option
from kvstore_service.cli.console import output, print_table
from kvstore_service.cli.stages import Stages

if TYPE_CHECKING:
    from kvstore_bench.faults import Outcome
    from kvstore_bench.results import Row

_DIGITS = {"back_p50_s": 1, "back_max_s": 1, "read_p50_ms": 0, "read_p99_ms": 0, "read_max_ms": 0}
_STAGES = {
    "start": "starting three Ray nodes",
    "faults": "processes killed",
    "puts": "chunks acknowledged",
    "audit": "repairing, and reading every copy",
}
_QUICK_PUTS, _QUICK_KILLS = 400, 3


def faults(
    puts: Annotated[int, typer.Option(min=1, help="Smallest number of acknowledged chunks.")] = 10_000,
    kills: Annotated[int, typer.Option(min=0, help="Number of processes to kill.")] = 20,
    seed: Annotated[int, typer.Option(help="Seed of the order and times of the kills.")] = 0,
    quick: Annotated[
        bool,
        typer.Option(
            "--quick", help=f"A short run of a minute: {_QUICK_PUTS} puts and {_QUICK_KILLS} kills."
        ),
    ] = False,
    json_file: JsonFile = None,
    plot: Annotated[Path | None, plot_option("every read over time")] = None,
) -> None:
    """Count lost chunks while processes of a cluster are killed: three Ray nodes, two copies, durable puts.

    During puts and gets of documents, storage actors, raylets with their child processes and the coordinator are killed
    at random, one after another, and storage nodes are partitioned. Every byte that is read is compared with the stored
    one. At the end, every copy of every acknowledged chunk is compared.
    """
    require_packages("ray", "psutil")
    require_outputs(json_file, plot)
    from kvstore_bench import write_results
    from kvstore_bench.faults import Options, failures, plot_faults, run

    options = Options(_QUICK_PUTS if quick else puts, _QUICK_KILLS if quick else kills, seed)
    console = output()
    with Stages(console, _STAGES) as stages:
        outcome = run(options, stages)
    _show(outcome)
    write_results(
        outcome.rows,
        json_file,
        outcome.meta,
        total=[outcome.total],
        failed_reads=failures(outcome.faults, outcome.events),
    )
    if plot is not None:
        total = outcome.total
        title = (
            f"{total['acknowledged_puts']} durable puts, {total['kills']} kills: "
            f"{total['failed_reads']} failed reads of {total['reads']}"
        )
        plot_faults(outcome.events, outcome.faults, title, plot)


def _show(outcome: "Outcome") -> None:
    columns = {
        "fault": "fault",
        "times": "times",
        "whole after, s": "back_p50_s",
        "at most": "back_max_s",
        "reads": "reads",
        "failed": "failed_reads",
        "no replica": "reads_without_replica",
        "p50, ms": "read_p50_ms",
        "p99": "read_p99_ms",
        "max": "read_max_ms",
    }
    print_table(
        result_table("reads of a document, without and during faults", columns, outcome.rows, _DIGITS)
    )
    print_table(result_table("total", {"": "what", " ": "value"}, _summary(outcome.total)))


def _summary(total: "Row") -> list[dict[str, str]]:
    repaired = total["repair_s"]
    return [
        {"what": what, "value": value}
        for what, value in {
            "chunks acknowledged": str(total["acknowledged_puts"]),
            "kills": f"{total['kills']}, and {total['partitions']} partitions",
            "wrong bytes read": str(total["wrong_bytes"]),
            "copies with wrong bytes": f"{total['wrong_copies']} of {total['checked_chunks']} chunks' copies",
            "durable chunks lost": str(total["lost_durable_chunks"]),
            "failed reads": f"{total['failed_reads']} of {total['reads']}",
            "reads while no replica lived": str(total["reads_without_replica"]),
            "read p99, steady": _ms(total["read_p99_steady_ms"]),
            "read p99, during failovers": _ms(total["read_p99_failover_ms"]),
            "every chunk on all its owners after": f"{repaired:.1f} s" if repaired is not None else "never",
        }.items()
    ]


def _ms(value: float | None) -> str:
    return f"{value:.0f} ms" if value is not None else "-"
