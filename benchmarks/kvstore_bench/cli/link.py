"""`kvstore bench link`: parses the options, runs the benchmark, shows and writes its result."""

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from kvstore_bench.cli.tables import require_outputs, require_packages, result_table, targets_table
from kvstore_bench.native_dtype import NATIVE_DTYPE, native_dtype
from kvstore_bench.output_options import JsonFile, plot_option
from kvstore_codec.errors import ConfigurationError
from kvstore_service.cli.console import output, print_table
from kvstore_service.cli.stages import Stages

if TYPE_CHECKING:
    from kvstore_bench.link import Result

_STAGES = {
    "start": "starting cluster and processes",
    "read": "calibrating: reading texts",
    "fit": "calibrating: fitting the transforms",
    "measure": "calibrating: measuring steps",
    "store": "storing the documents' KV",
    "cachegen": "coding the documents' KV with CacheGen",
    "judge": "measuring fidelity",
    "questions": "asking questions",
}
_BANDWIDTHS = "50mbit,100mbit,200mbit,500mbit,1gbit,5gbit"
_TOKENS = "1024,4096"
_DIGITS = {"kl": 4, "MB": 2, "Mbit/s": 0, "speedup": 1, "ttft_over_longest_stage": 2}


class ShaperName(StrEnum):
    USERSPACE = "userspace"
    NETNS = "netns"


class DType(StrEnum):
    BFLOAT16 = "bfloat16"
    FLOAT32 = "float32"


class Floor(StrEnum):
    EXACT = "exact"
    HIGH = "high"
    MEDIUM = "medium"
    LOW = "low"
    NONE = "none"


def link(
    bandwidth: Annotated[
        str | None, typer.Option(help="Bandwidths of the link, comma-separated.", show_default=_BANDWIDTHS)
    ] = None,
    tokens: Annotated[
        str | None,
        typer.Option(
            help="Tokens of the reused document, comma-separated multiples of 256.", show_default=_TOKENS
        ),
    ] = None,
    policy: Annotated[
        str | None,
        typer.Option(
            help="Comma-separated: cold, raw, cachegen, kvfetcher, adaptive, adaptive-kept (no replanning during "
            "a fetch), adaptive-serial (one stage after the other), and encodings (medium-klt-pco, ...).",
            show_default="what the project compares",
        ),
    ] = None,
    shaper: Annotated[
        ShaperName,
        typer.Option(help="userspace, or netns: the kernel shapes a network namespace, which needs root."),
    ] = ShaperName.USERSPACE,
    jitter: Annotated[
        list[str] | None,
        typer.Option(
            help="Pattern of the bandwidth during an answer, repeatable: none, step, "
            "step:1gbit,50mbit,at=0.1s,for=2s, saw, saw:50mbit,period=0.5s, trace:FILE of lines 'seconds bit/s'.",
            show_default="none",
        ),
    ] = None,
    dtype: Annotated[
        DType | None, typer.Option(help="Dtype of model and KV.", show_default=NATIVE_DTYPE)
    ] = None,
    repeats: Annotated[
        int | None,
        typer.Option(min=1, help="Rounds after the first one, which is a warm-up.", show_default="5"),
    ] = None,
    floor: Annotated[Floor, typer.Option(help="Lowest precision that adaptive may use.")] = Floor.MEDIUM,
    pipelined: Annotated[bool, typer.Option(help="Whether the stages of adaptive overlap.")] = True,
    replan: Annotated[bool, typer.Option(help="Whether adaptive replans during a fetch.")] = True,
    quick: Annotated[
        bool,
        typer.Option(
            "--quick",
            help="A short run of minutes: fewer values of every option that is not given, and a small calibration.",
        ),
    ] = False,
    json_file: JsonFile = None,
    plot: Annotated[Path | None, plot_option("time to first token over bandwidth")] = None,
    trace: Annotated[
        Path | None, typer.Option(help="Write a Chrome trace of the last adaptive run to this file.")
    ] = None,
    timeline: Annotated[
        Path | None,
        typer.Option(
            help="Write a plot of the stages of the last adaptive run to this file (.png, .svg or .pdf)."
        ),
    ] = None,
) -> None:
    """Measure, by policy, the time to the first token of a question about a document whose KV is behind a slow link.

    Policies take turns in one process. cold prefills everything, raw reuses uncompressed KV, the name of an encoding
    always reuses KV in that encoding, kvfetcher and adaptive choose. cachegen transfers the bytes of LMCache's
    CacheGen, and its decoding counts as free; it is included if `python benchmarks/peers/install.py lmcache` has
    run. A policy without choices that is far slower than cold is measured less often; the rows give the number.
    """
    require_packages("grpc_reflection", "psutil", "ray", "transformers")
    require_outputs(json_file, plot)
    require_outputs(trace, timeline)
    from kvstore_bench import write_results
    from kvstore_bench.link import DEFAULT_POLICIES, Options, plot_link, run, targets
    from kvstore_codec.encoding import Rate
    from kvstore_service.bandwidth import parse_bandwidth

    options = Options(
        [
            parse_bandwidth(text)
            for text in (bandwidth or ("50mbit,1gbit" if quick else _BANDWIDTHS)).split(",")
        ],
        _numbers(tokens or ("1024" if quick else _TOKENS)),
        DEFAULT_POLICIES if policy is None else list(filter(None, policy.split(","))),
        shaper.value,
        jitter or ["none"],
        dtype.value if dtype is not None else native_dtype(),
        repeats or (2 if quick else 5),
        None if floor is Floor.NONE else Rate(floor.value),
        {"pipelined": pipelined, "replan": replan},
        quick,
        trace,
        timeline,
    )
    console = output()
    with Stages(console, _STAGES) as stages:
        result = run(options, stages)
    goals = targets(result.rows)
    _show(console, result, goals)
    write_results(result.rows, json_file, result.meta, targets=goals)
    if plot is not None:
        plot_link(result.rows, plot)


def _numbers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ConfigurationError(f"--tokens {text!r}: whole numbers, separated by commas") from None


def _show(console: Console, result: "Result", goals: list[dict[str, Any]]) -> None:
    columns = {
        "Mbit/s": "Mbit/s",
        "policy": "policy",
        "TTFT s": "ttft_s",
        "min": "ttft_min_s",
        "max": "ttft_max_s",
        "runs": "repeats",
        "x cold": "speedup",
        "MB": "MB",
        "reused": "reused_tokens",
        "KL": "kl",
        "same": "same",
        "/ stage": "ttft_over_longest_stage",
        "replans": "replans",
    }
    rows = [
        row
        | {
            "Mbit/s": row["bandwidth_bps"] / 1e6,
            "MB": row["bytes"] / 1e6,
            "speedup": row["cold_ttft_s"] / row["ttft_s"],
            "same": "yes" if row["same_tokens"] else "no",
        }
        for row in result.rows
    ]
    for tokens, jitter in dict.fromkeys((row["tokens"], row["jitter"]) for row in rows):
        chosen = [row for row in rows if (row["tokens"], row["jitter"]) == (tokens, jitter)]
        title = f"{tokens} tokens reused, jitter {jitter}, {chosen[0]['dtype']}, {chosen[0]['shaper']}"
        print_table(result_table(title, columns, chosen, _DIGITS))
    if goals:
        print_table(targets_table("targets of the adaptive policy", goals, digits=2))
    for note in result.left_out:
        console.print(note, soft_wrap=True, markup=False)
