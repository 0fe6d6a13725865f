"""`kvstore tune`: parses the options, runs the benchmark, shows and writes its result."""

from pathlib import Path
from typing import Annotated

import typer

from kvstore_bench.cli.tables import require_outputs, require_packages, result_table
from kvstore_bench.output_options import JsonFile, plot_option
from kvstore_service.cli.console import output, print_table
from kvstore_service.cli.stages import Stages
from kvstore_service.models import DType, load_model

_TIERS = "dram,ssd,hdd"
_STAGES = {"start": "cluster and documents"} | {
    f"{stage}-{tier}": f"{label}, {tier}"
    for tier in ("dram", "ssd", "hdd", "disk")
    for stage, label in (("tune", "searching the ratio"), ("sweep", "measuring a sweep of ratios"))
}
_DIGITS = {"compute_ms": 3, "transfer_ms": 4, "over_best": 3}


def tune(
    model: Annotated[str, typer.Option(help="A folder in transformers format, or smollm2.")],
    tier: Annotated[
        str | None,
        typer.Option(
            help="Where documents are stored, comma-separated: dram, ssd (a disk of 550 MB/s), hdd (160 MB/s), disk "
            "(the disk of --data-dir at its own speed). Workers use the ratio of dram or disk; without a ratio for "
            "disk, that of ssd or of KVSTORE_DISK_TIER.",
            show_default=_TIERS,
        ),
    ] = None,
    selector: Annotated[
        str | None,
        typer.Option(
            help="Selector of recomputed tokens; use that of the workers.",
            show_default="KVSTORE_RECOMPUTE_SELECTOR, else focus",
        ),
    ] = None,
    drift: Annotated[
        bool | None,
        typer.Option(
            "--drift/--no-drift",
            help="Whether the change of recomputed tokens also shifts their neighbours.",
            show_default="KVSTORE_RECOMPUTE_DRIFT, else yes",
        ),
    ] = None,
    tokens: Annotated[
        int, typer.Option(min=1, help="Tokens of the documents in a prompt, a multiple of 512.")
    ] = 3072,
    repeats: Annotated[int, typer.Option(min=1, help="Rounds per measurement.")] = 3,
    sweep: Annotated[
        int,
        typer.Option(
            min=0,
            help="Also measure this many evenly spaced ratios, and compare the tuned one with the best.",
        ),
    ] = 0,
    data_dir: Annotated[
        Path | None,
        typer.Option(
            help="Folder on the disk to measure; only temporary files are written.",
            show_default="a temporary one",
        ),
    ] = None,
    dtype: Annotated[
        DType, typer.Option(help="Dtype in which workers run the model; auto: as saved.")
    ] = DType.AUTO,
    model_id: Annotated[str | None, typer.Option(help="The model id, if workers set one.")] = None,
    json_file: JsonFile = None,
    plot: Annotated[Path | None, plot_option("time to first token over the ratio")] = None,
) -> None:
    """Tune the recompute ratio to this machine.

    Starts its own cluster. For each tier that may store a text, it searches for the recompute ratio with the shortest
    time to the first token. Workers with the same cache folder (KVSTORE_CACHE_DIR) use the result.
    """
    require_packages("grpc_reflection", "psutil", "ray", "transformers")
    require_outputs(json_file, plot)
    from kvstore_bench import write_results
    from kvstore_bench.tuning import Options, plot_ratios, tune_tiers
    from kvstore_client.recompute import Recompute
    from kvstore_client.settings import ClientSettings

    settings = ClientSettings()
    recompute = Recompute(
        selector or settings.recompute.selector,
        drift=settings.recompute.drift if drift is None else drift,
    )
    options = Options(
        recompute,
        settings.cache_dir,
        [name.strip() for name in (tier or _TIERS).split(",") if name.strip()],
        tokens,
        repeats,
        sweep,
        data_dir,
    )
    console = output()
    loaded, tokenizer = load_model(model, dtype)
    with Stages(console, _STAGES) as stages:
        result = tune_tiers(loaded, tokenizer, options, stages, model_id=model_id)
    write_results(result.rows, json_file, result.meta)
    if plot is not None:
        plot_ratios(result.rows, plot)
    columns = {
        "tier": "tier", "t_c ms": "compute_ms", "t_i ms": "transfer_ms", "r0": "first_ratio", "ratio": "ratio",
        "TTFT s": "ttft_s", "full s": "full_ttft_s",
    }  # fmt: skip
    if options.sweep:
        columns |= {"best of sweep": "best_ratio", "its TTFT s": "best_ttft_s", "/ best": "over_best"}
    rows = [
        row | {"compute_ms": row["compute_s"] * 1e3, "transfer_ms": row["transfer_s"] * 1e3}
        for row in result.rows
    ]
    tuned = f"{recompute.selector}, {'with' if recompute.drift else 'without'} drift"
    print_table(result_table(f"tuned for {tuned}, {options.tokens} tokens reused", columns, rows, _DIGITS))
    console.print(f"written to {result.path}: workers that start from now on use it", soft_wrap=True)
