"""`kvstore bench recompute`: parses the options, runs the benchmark, shows and writes its result."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvstore_bench.cli.tables import require_outputs, require_packages, result_table, targets_table
from kvstore_bench.native_dtype import NATIVE_DTYPE, native_dtype
from kvstore_bench.output_options import JsonFile, plot_option
from kvstore_codec.errors import ConfigurationError
from kvstore_service.cli.console import output, print_table
from kvstore_service.cli.stages import Stages
from kvstore_service.models import DType

if TYPE_CHECKING:
    from kvstore_bench.recompute import Result

_TIERS = ("dram", "ssd", "hdd")
_STAGES = (
    {"start": "starting cluster and model"}
    | {f"time-{tier}": f"time to first token, {tier}" for tier in _TIERS}
    | {f"batch-{tier}": f"batches, {tier}" for tier in _TIERS}
    | {f"tune-{tier}": f"tuning the ratio, and a sweep, {tier}" for tier in _TIERS}
    | {"judge": "measuring fidelity"}
)
_SELECTORS = "focus,focus-nodrift,query,hkvd,first_k,frequency,frequency-high,random"
_RATIOS = "0,.05,.15,.3,1"
_QUICK_SELECTORS, _QUICK_RATIOS = "focus,hkvd,first_k,frequency", "0,.15,1"
_DIGITS = {
    "kl": 4,
    "kl_most": 4,
    "closed": 2,
    "top1": 3,
    "ratio": 2,
    "speedup": 2,
    "MB": 1,
    "throughput_tok_s": 0,
    "full_throughput_tok_s": 0,
}


def recompute(
    selector: Annotated[
        str | None,
        typer.Option(
            help="Comma-separated: focus, focus-nodrift, query, hkvd, first_k, frequency, frequency-high, "
            "random.",
            show_default=_SELECTORS,
        ),
    ] = None,
    ratio: Annotated[
        str | None,
        typer.Option(help="Recompute ratios, comma-separated.", show_default=_RATIOS),
    ] = None,
    tier: Annotated[
        str | None,
        typer.Option(
            help="Where documents are stored, comma-separated: dram, ssd (550 MB/s), hdd (160 MB/s).",
            show_default=",".join(_TIERS),
        ),
    ] = None,
    prompts: Annotated[
        int | None, typer.Option(min=1, max=10, help="Prompts of each kind for KL.", show_default="8")
    ] = None,
    tokens: Annotated[
        int | None,
        typer.Option(
            help="Tokens of the documents in the timed prompt, a multiple of 512.", show_default="3072"
        ),
    ] = None,
    batch: Annotated[
        int | None,
        typer.Option(min=0, help="Number of concurrent requests; 0 skips this part.", show_default="16"),
    ] = None,
    repeats: Annotated[int | None, typer.Option(min=1, help="Measured rounds.", show_default="5")] = None,
    dtype: Annotated[
        DType | None,
        typer.Option(
            help="Dtype of model and KV for times; KL is measured in float32.",
            show_default=NATIVE_DTYPE,
        ),
    ] = None,
    quick: Annotated[
        bool,
        typer.Option(
            "--quick", help="A short run of a minute: fewer values of every option that is not given."
        ),
    ] = False,
    json_file: JsonFile = None,
    plot: Annotated[Path | None, plot_option("KL and time to first token over the ratio")] = None,
) -> None:
    """Measure fidelity and time to the first token of documents reused in another order and context, by selector and
    ratio of recomputed tokens.

    Each document is stored by a separate request, after the system prefix. KL compares the predictions at the
    question's tokens with full recompute. Seconds are the time to the first token; the plain model is measured in the
    same rounds. Published selectors run as published; focus also shifts neighbouring tokens by the change of
    recomputed ones.
    """
    require_packages("grpc_reflection", "psutil", "ray", "transformers")
    require_outputs(json_file, plot)
    from kvstore_bench import write_results
    from kvstore_bench.recompute import Options, plot_recompute, run, targets

    options = Options(
        _names(selector or (_QUICK_SELECTORS if quick else _SELECTORS)),
        _ratios(ratio or (_QUICK_RATIOS if quick else _RATIOS)),
        _names(tier or ("dram" if quick else ",".join(_TIERS))),
        prompts or (1 if quick else 8),
        tokens or (1024 if quick else 3072),
        batch if batch is not None else (2 if quick else 16),
        repeats or (1 if quick else 5),
        dtype or DType(native_dtype()),
        quick,
    )
    console = output()
    with Stages(console, _STAGES) as stages:
        result = run(options, stages)
    # A quick run has one prompt of each kind, which is too little to check targets.
    goals = [] if quick else targets(result.rows, result.tuned)
    _show(result, goals)
    write_results(result.rows, json_file, result.meta, tuned=result.tuned, targets=goals)
    if plot is not None:
        plot_recompute(result.rows, plot)


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _ratios(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise ConfigurationError(f"--ratio {text!r}: numbers from 0 to 1, separated by commas") from None


def _show(result: "Result", goals: list[dict[str, Any]]) -> None:
    fidelity = {
        "selector": "selector", "ratio": "ratio", "KL": "kl", "max KL": "kl_most", "closed": "closed", "top-1": "top1",
    }  # fmt: skip
    first = result.rows[0]["tier"]
    for kind in dict.fromkeys(row["kind"] for row in result.rows):
        rows = [
            row for row in result.rows if (row["kind"], row["tier"], row["tuned"]) == (kind, first, False)
        ]
        print_table(result_table(f"fidelity, {kind}", fidelity, rows, _DIGITS))
    times = {
        "selector": "selector", "ratio": "ratio", "TTFT s": "ttft_s", "min": "ttft_min_s", "max": "ttft_max_s",
        "full s": "full_ttft_s", "x full": "speedup", "tok/s": "throughput_tok_s",
        "full tok/s": "full_throughput_tok_s", "MB": "MB", "recomputed": "recomputed",
    }  # fmt: skip
    kind = result.rows[0]["kind"]
    for tier in dict.fromkeys(row["tier"] for row in result.rows):
        rows = [
            row
            | {
                "MB": row["bytes"] / 1e6,
                "selector": row["selector"] + (" (tuned)" if row["tuned"] else ""),
                "recomputed": "all" if row["prefilled"] else str(row["recomputed_tokens"]),
            }
            for row in result.rows
            if (row["kind"], row["tier"]) == (kind, tier)
        ]
        title = f"{tier}, {rows[0]['tokens']} tokens of documents, {result.meta['dtype']}"
        print_table(result_table(title, times, rows, _DIGITS))
    if result.tuned:
        columns = {
            "tier": "tier", "ratio": "ratio", "initial": "first_ratio", "TTFT s": "ttft_s",
            "best of sweep": "best_ratio", "its TTFT s": "best_ttft_s", "/ best": "over_best",
        }  # fmt: skip
        print_table(result_table("tuned ratio of focus", columns, result.tuned, _DIGITS))
    if goals:
        print_table(targets_table("targets of reuse", goals, digits=3))
