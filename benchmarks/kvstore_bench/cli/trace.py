"""`kvstore bench trace`: parses the options, runs the benchmark, shows and writes its result."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from kvstore_bench.cli.tables import (
    require_outputs,
    result_table,
)
from kvstore_bench.output_options import JsonFile, plot_option
from kvstore_codec.errors import ConfigurationError
from kvstore_service.cli.console import output, print_table
from kvstore_service.cli.stages import Stages

if TYPE_CHECKING:
    from kvstore_bench.trace import Result

_STAGES = {
    "replay": "replaying the trace",
    "others": "replaying other workloads",
    "placement": "placing chunks on nodes",
    "nodes": "replaying through nodes",
}


def trace(
    trace_file: Annotated[
        Path,
        typer.Argument(
            metavar="TRACE.jsonl",
            help="JSON lines with timestamp (ms), input_length, output_length, hash_ids, in Mooncake's format.",
        ),
    ],
    capacity: Annotated[
        str, typer.Option(help="Cache sizes, comma-separated, in percent of the trace's distinct blocks.")
    ] = "1%,2%,5%,10%,20%,50%",
    policy: Annotated[str, typer.Option(help="Eviction policies, comma-separated.")] = "lru,s3-fifo,value",
    nodes: Annotated[str, typer.Option(help="Numbers of nodes, comma-separated.")] = "3,10,100,1000",
    quick: Annotated[
        bool, typer.Option("--quick", help="A short run: the first 2,000 prompts, without other workloads.")
    ] = False,
    through_nodes: Annotated[
        bool,
        typer.Option(
            "--through-nodes",
            help="Also replay on real storage nodes, and with texts larger than memory; takes some minutes.",
        ),
    ] = False,
    json_file: JsonFile = None,
    plot: Annotated[Path | None, plot_option("hit rates over capacity")] = None,
) -> None:
    """Replay a trace of prompts through the eviction policies and the placement, in virtual time.

    A prefix hit counts only if all earlier blocks of its prompt also hit. `optimal` is the hit rate of a policy that
    knows the future.
    """
    require_outputs(json_file, plot)
    from kvstore_bench import write_results
    from kvstore_bench.trace import Options, plot_hit_rates, plot_through_nodes, run

    options = Options(
        trace_file,
        tuple(map(_fraction, _parts(capacity))),
        _parts(policy),
        tuple(map(_count, _parts(nodes))),
        quick,
        through_nodes,
    )
    console = output()
    with Stages(console, _STAGES) as stages:
        result = run(options, stages)
    _show(console, result)
    write_results(
        result.rows,
        json_file,
        result.meta,
        other_workloads=result.other_workloads,
        balance=result.balance,
        movement=result.movement,
        through_nodes=result.through_nodes,
    )
    if plot is not None and through_nodes:
        plot_through_nodes(result.through_nodes, plot)
    elif plot is not None:
        plot_hit_rates(result.rows, f"{result.meta['trace']}: prefix hits by eviction policy", plot)


def _parts(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))


def _fraction(text: str) -> float:
    try:
        return float(text.removesuffix("%")) / 100
    except ValueError as error:
        raise ConfigurationError(
            f"{text!r} is not a capacity; write 5% for a twentieth of the blocks"
        ) from error


def _count(text: str) -> int:
    try:
        return int(text)
    except ValueError as error:
        raise ConfigurationError(f"{text!r} is not a number of nodes") from error


def _show(console: Console, result: "Result") -> None:
    meta = result.meta
    console.print(
        f"{meta['requests']:,} prompts, {meta['references']:,} block references, {meta['distinct_chunks']:,} distinct "
        f"blocks; an unlimited cache hits {meta['infinite_hit_rate']:.1%}",
        style="dim",
    )
    for title, rows in (("hit rates", result.rows), ("other workloads", result.other_workloads)):
        if rows:
            print_table(_rates(title, rows))
    if result.through_nodes:
        print_table(_through_nodes(result.through_nodes))
    print_table(
        result_table(
            "load of the most loaded node, relative to its share",
            {
                "nodes": "nodes",
                "weights": "weights",
                "chunks": "chunks_max_over_mean",
                "requests": "requests_max_over_mean",
                "requests, lower bound": "requests_bound",
            },
            result.balance,
        )
    )
    print_table(
        result_table(
            "share of the chunks that moves",
            {
                "nodes": "nodes",
                "one joins": "joined_fraction_moved",
                "one leaves": "left_fraction_moved",
                "1.1 / nodes": "bound",
            },
            result.movement,
            {"joined_fraction_moved": 5, "left_fraction_moved": 5, "bound": 5},
        )
    )


def _through_nodes(rows: list[dict[str, Any]]) -> Any:
    shown = [row | {"capacity": f"{100 * row['capacity_fraction']:g} %"} for row in rows]
    columns = {
        "workload": "workload",
        "capacity": "capacity",
        "policy": "policy",
        "nodes": "nodes",
        "clients": "clients",
        "prefix hits": "prefix_hit_rate",
        "counted": "counted_hit_rate",
        "puts": "puts",
        "beginnings": "beginnings_hit_rate",
        "optimal": "optimal_hit_rate",
    }
    rates = ("prefix_hit_rate", "counted_hit_rate", "beginnings_hit_rate", "optimal_hit_rate")
    return result_table("through storage nodes", columns, shown, dict.fromkeys(rates, 4))


def _rates(title: str, rows: list[dict[str, Any]]) -> Any:
    shown = [row | {"capacity": f"{100 * row['capacity_fraction']:g} %"} for row in rows]
    columns = {
        "workload": "workload",
        "capacity": "capacity",
        "chunks": "capacity_chunks",
        "policy": "policy",
        "hits": "hit_rate",
        "prefix hits": "prefix_hit_rate",
        "optimal": "optimal_hit_rate",
    }
    digits = {"hit_rate": 4, "prefix_hit_rate": 4, "optimal_hit_rate": 4}
    return result_table(title, columns, shown, digits)
