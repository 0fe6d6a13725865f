"""`kvstore bench store`: parses the options, runs the benchmark, shows and writes its result."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from kvstore_bench.cli.tables import require_outputs, require_packages, result_table
from kvstore_bench.output_options import JsonFile, plot_option
from kvstore_codec.errors import ConfigurationError
from kvstore_service.cli.console import output, print_table
from kvstore_service.cli.stages import Stages

if TYPE_CHECKING:
    from kvstore_bench.store.run import Result

_STAGES = {"start": "starting servers", "measure": "measuring"}
_DIGITS = {"GBps": 2, "GBps_min": 2, "GBps_max": 2, "p50_ms": 3, "p99_ms": 3}
_KIB = 1024
_SIZES = "64,1024,4096,16384"
_CLIENTS = "1,2,4,8"


def store(
    sizes: Annotated[str, typer.Option(help="Sizes of values in KiB, comma-separated.")] = _SIZES,
    clients: Annotated[
        str, typer.Option(help="Numbers of concurrent client processes, comma-separated.")
    ] = _CLIENTS,
    systems: Annotated[
        str | None,
        typer.Option(
            help="Systems to measure, comma-separated; default: all that are installed, except kvstore-disk and "
            "kvstore-encrypted, which read and write a disk, plain and with encryption at rest, and kvstore-tls and "
            "kvstore-mtls.",
            show_default=False,
        ),
    ] = None,
    seconds: Annotated[
        float, typer.Option(min=0.05, help="Duration of each measurement in each round, in seconds.")
    ] = 0.4,
    rounds: Annotated[
        int, typer.Option(min=1, help="Number of rounds; in each round every system is measured.")
    ] = 5,
    quick: Annotated[
        bool, typer.Option("--quick", help="A short run of a minute: one client, up to 4 MiB, short rounds.")
    ] = False,
    json_file: JsonFile = None,
    plot: Annotated[Path | None, plot_option("throughput over size")] = None,
) -> None:
    """Measure reading and writing of values, compared with Redis, Mooncake's store, LMCache's server and TCP alone.

    Every client is a process. Values are in memory, unless a system with a disk is named. They differ between keys, and
    are compared byte by byte outside the measured time. Puts are acknowledged; kvstore verifies every checksum before.
    Other systems are included if `python benchmarks/peers/install.py redis` (mooncake, lmcache) has run.
    """
    require_packages("grpc_reflection", "psutil")
    require_outputs(json_file, plot)
    from kvstore_bench import write_results
    from kvstore_bench.store.plot import plot_throughput
    from kvstore_bench.store.run import Options, run
    from kvstore_bench.store.systems import SYSTEMS

    names = (
        [system.name for system in SYSTEMS if not system.on_demand]
        if systems is None
        else list(filter(None, systems.split(",")))
    )
    options = (
        Options((64 * _KIB, 1024 * _KIB, 4096 * _KIB), (1,), names, 0.2, 3)
        if quick
        else Options(
            [size * _KIB for size in _numbers("--sizes", sizes)],
            _numbers("--clients", clients),
            names,
            seconds,
            rounds,
        )
    )
    console = output()
    with Stages(console, _STAGES) as stages:
        result = run(options, stages)
    _show(console, result)
    write_results(
        result.rows,
        json_file,
        {
            "clients": "processes",
            "seconds": options.seconds,
            "rounds": options.rounds,
            "GBps": "1e9 bytes of values per second, all clients together; median, minimum and maximum over the rounds",
            "left_out": result.left_out,
        },
    )
    if plot is not None:
        plot_throughput(result.rows, plot)


def _numbers(option: str, text: str) -> list[int]:
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 1:
        raise ConfigurationError(f"{option} {text!r}: whole numbers from 1, separated by commas")
    return numbers


def _show(console: Console, result: "Result") -> None:
    columns = {
        "system": "system",
        "KiB": "KiB",
        "GB/s": "GBps",
        "min": "GBps_min",
        "max": "GBps_max",
        "p50 ms": "p50_ms",
        "p99 ms": "p99_ms",
    }
    transfers = [row | {"KiB": row["size_bytes"] // _KIB} for row in result.rows if "size_bytes" in row]
    for clients in sorted({row["clients"] for row in transfers}):
        for op in ("get", "get+verify", "put"):
            rows = [row for row in transfers if (row["clients"], row["op"]) == (clients, op)]
            if rows:
                title = f"{op}, {clients} client{'s' if clients > 1 else ''}"
                rows.sort(key=lambda row: (row["KiB"], -row["GBps"]))
                print_table(result_table(title, columns, rows, _DIGITS))
    lookups = [row for row in result.rows if "chunks" in row]
    if lookups:
        columns = {"": "op", "chunks": "chunks", "p50 ms": "p50_ms", "p99 ms": "p99_ms"}
        print_table(result_table("lookup", columns, lookups, _DIGITS))
    for note in result.left_out:
        console.print(note, soft_wrap=True, markup=False)
