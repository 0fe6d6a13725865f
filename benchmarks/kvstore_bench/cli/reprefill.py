"""`kvstore bench reprefill`: parses the options, runs the benchmark, shows and writes its result."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvstore_bench.cli.tables import require_outputs, require_packages, result_table, targets_table
from kvstore_bench.native_dtype import NATIVE_DTYPE, native_dtype
from kvstore_bench.output_options import JsonFile, plot_option
from kvstore_codec.errors import ConfigurationError
from kvstore_service.cli.console import output, print_table
from kvstore_service.cli.stages import Stages
from kvstore_service.models import SMOLLM2, DType

if TYPE_CHECKING:
    from kvstore_bench.reprefill import Result
    from kvstore_bench.reprefill.rows import Row

_GRID = "Budgets and encodings"
_SYSTEMS = "contiguous,impress,as_h2o_lru,full,cold"
_BUDGETS, _DISKS = ".05,.1,.25,.5", "unthrottled,nvme,ssd,hdd,balanced,even"
_STAGES = {
    "read": "reading texts with the model", "fit": "fitting the transforms", "measure": "measuring steps",
    "start": "storing the prefix", "ask": "asking",
}  # fmt: skip
_DIGITS = {
    "budget": 2, "ttft_s": 3, "p95_s": 3, "MB": 2, "amplification": 2, "tokens_read": 0, "kl": 4, "top1": 3,
    "right": 2, "cache_hit_rate": 2, "idle_io_fraction": 2, "idle_compute_fraction": 2, "faster": 2, "faster_p95": 2,
    "tokens_read_ratio": 1, "factor": 2,
}  # fmt: skip


def reprefill(
    system: Annotated[
        str | None,
        typer.Option(
            help="Comma-separated: contiguous; contiguous-ahead (reads ahead), contiguous-no-cache, "
            "contiguous-four-layers, contiguous-by-layer (layers of a period); contiguous-64, contiguous-32, "
            "contiguous-16 (tokens of a frame); "
            "impress, impress-16, impress-reordered, as_h2o_lru, as_h2o_lfu, full, cold.",
            show_default=_SYSTEMS,
        ),
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(help="Shares of the prefix's tokens, comma-separated.", show_default=_BUDGETS),
    ] = None,
    disk: Annotated[
        str | None,
        typer.Option(
            help="Disks, comma-separated: unthrottled, nvme (3.5 GB/s), ssd (550 MB/s), hdd (160 MB/s), balanced "
            "(impress waits for it 70 % of the time), even (contiguous reads for as long as it computes).",
            show_default=_DISKS,
        ),
    ] = None,
    tokens: Annotated[
        int | None, typer.Option(help="Tokens of the prefix, a multiple of 256.", show_default="4096")
    ] = None,
    questions: Annotated[
        int | None, typer.Option(min=3, max=60, help="Questions about the prefix.", show_default="21")
    ] = None,
    cache_share: Annotated[
        float, typer.Option(min=0, max=1, help="Cache of every system, as a share of the prefix's KV.")
    ] = 0.25,
    probes: Annotated[int, typer.Option(min=1, max=3, help="Probe heads of impress.")] = 1,
    encoding: Annotated[
        str | None,
        typer.Option(
            help="Encoding of the prefix in our store; with --grid several.", show_default="exact-zstd@16x2"
        ),
    ] = None,
    dtype: Annotated[
        DType | None, typer.Option(help="Dtype of model and KV.", show_default=NATIVE_DTYPE)
    ] = None,
    model: Annotated[
        str,
        typer.Option(
            help=f"{SMOLLM2}, qwen (Qwen2.5-Coder-0.5B-Instruct), or a folder with a model in transformers format."
        ),
    ] = SMOLLM2,
    minutes: Annotated[
        float | None,
        typer.Option(
            min=0, help="Begin no further row after this time. Ctrl-C also keeps what was measured."
        ),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="A short run: fewer values of every option that is not given.")
    ] = False,
    grid: Annotated[
        bool,
        typer.Option(
            help="Measure every pair of budget and encoding, and what a budget of auto chooses.",
            rich_help_panel=_GRID,
        ),
    ] = False,
    calibration: Annotated[
        Path | None,
        typer.Option(help="Calibration of the encodings. Default: one is fitted.", rich_help_panel=_GRID),
    ] = None,
    keep: Annotated[
        bool,
        typer.Option(
            "--keep",
            help="Keep what parts of the prefix lose, for budgets of auto here.",
            rich_help_panel=_GRID,
        ),
    ] = False,
    json_file: JsonFile = None,
    plot: Annotated[Path | None, plot_option("time to first token and KL over the budget")] = None,
) -> None:
    """Measure questions about a long stored prefix of which only a part is read, by system, budget and disk.

    The baselines read the same KV, uncompressed, from a local file without a network; ours goes through the service.
    KL compares predictions with those over the whole prefix. The rates of balanced disks are measured first.
    """
    require_packages("grpc_reflection", "psutil", "ray", "transformers")
    require_outputs(json_file, plot)
    from kvstore_bench import write_results
    from kvstore_bench.reprefill import Options, gain, run, speedups, targets
    from kvstore_bench.reprefill.grid import BUDGETS, ENCODINGS, GridOptions, run_grid
    from kvstore_bench.reprefill.grid import RATES_Bps as GRID_RATES_Bps
    from kvstore_bench.reprefill.plot import plot_reprefill

    if grid:
        grid_options = GridOptions(
            _names(encoding) if encoding else ENCODINGS,
            _shares(budget) if budget else BUDGETS,
            _names(disk) if disk else tuple(GRID_RATES_Bps),
            tokens or (1024 if quick else 4096),
            questions or (6 if quick else 21),
            cache_share=cache_share,
            dtype=dtype or DType(native_dtype()),
            calibration=calibration,
            keep=keep,
            quick=quick,
        )
        with Stages(output(), _STAGES) as stages:
            found = run_grid(grid_options, stages)
        _show_grid(found.rows, found.targets)
        write_results(found.rows, json_file, found.meta, targets=found.targets)
        return
    options = Options(
        _names(system or _SYSTEMS),
        _shares(budget or (".05,.25" if quick else _BUDGETS)),
        _names(disk or ("ssd" if quick else _DISKS)),
        tokens or (1024 if quick else 4096),
        questions or (6 if quick else 21),
        cache_share,
        probes,
        dtype or DType(native_dtype()),
        encoding or "exact-zstd@16x2",
        model,
        minutes,
    )
    with Stages(output(), _STAGES) as stages:
        result = run(options, stages)
    tables = {"speedups": speedups(result.rows), "gain": gain(result.rows), "targets": targets(result.rows)}
    _show(result, **tables)
    write_results(result.rows, json_file, result.meta, **tables)
    if plot is not None:
        plot_reprefill(result.rows, plot)


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _shares(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise ConfigurationError(f"--budget {text!r}: numbers from 0 to 1, separated by commas") from None


def _show(
    result: "Result",
    speedups: list[dict[str, Any]],
    gain: list[dict[str, Any]],
    targets: list[dict[str, Any]],
) -> None:
    columns = {
        "system": "system", "budget": "budget", "TTFT s": "ttft_s", "p95 s": "p95_s", "MB read": "MB",
        "amplified": "amplification", "tokens read": "tokens_read", "hits": "cache_hit_rate",
        "idle I/O": "idle_io_fraction", "idle compute": "idle_compute_fraction", "KL": "kl", "top-1": "top1",
        "right": "right",
    }  # fmt: skip
    for disk in dict.fromkeys(row["disk"] for row in result.rows):
        rows = [
            row | {"MB": row["bytes_read"] / 1e6, "amplification": row["read_amplification"]}
            for row in result.rows
            if row["disk"] == disk
        ]
        rate = rows[0]["disk_bandwidth_Bps"]
        speed = "" if rate is None else f" ({rate / 1e6:.0f} MB/s)"
        title = f"{disk}{speed}, a prefix of {rows[0]['prefix_tokens']} tokens, {result.meta['dtype']}"
        print_table(result_table(title, columns, rows, _DIGITS))
    if speedups:
        columns = {
            "disk": "disk", "budget": "budget", "system": "system", "x slower": "faster", "p95 x slower": "faster_p95",
            "its idle compute": "idle_compute_fraction", "tokens read x": "tokens_read_ratio",
        }  # fmt: skip
        print_table(result_table("other systems against contiguous", columns, speedups, _DIGITS))
    if gain:
        columns = {"disk": "disk", "budget": "budget", "part": "part", "factor": "factor"}
        print_table(result_table("what the gain over impress consists of", columns, gain, _DIGITS))
    if targets:
        print_table(targets_table("targets of re-prefill", targets, digits=3))


def _show_grid(rows: "Sequence[Row]", targets: "Sequence[Row]") -> None:
    columns = {
        "system": "system", "floor": "floor", "budget": "budget", "encoding": "encoding", "TTFT s": "ttft_s",
        "p95 s": "p95_s", "MB read": "MB", "hits": "cache_hit_rate", "KL": "kl", "top-1": "top1",
    }  # fmt: skip
    for disk in dict.fromkeys(row["disk"] for row in rows):
        shown = [row | {"MB": row["bytes_read"] / 1e6} for row in rows if row["disk"] == disk]
        print_table(
            result_table(f"{disk}, a prefix of {shown[0]['prefix_tokens']} tokens", columns, shown, _DIGITS)
        )
    print_table(targets_table("targets", targets, digits=3))
