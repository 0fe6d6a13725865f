"""Time to first token of vLLM on a CPU, with the KV of the prompt behind links of several bandwidths.

    python benchmarks/vllm_ttft.py --json F --plot F.png

Each policy is an OpenAI server of its own, asked over HTTP: `cold` without a connector, `exact` and `adaptive` with the
connector of this project, `lmcache-raw` and `lmcache-fp8` with LMCache's server and Redis. Not among the defaults are
`exact-raw`, which stores exact KV without compression, and `adaptive-both`, which stores lossy KV a second time in an
encoding that is larger and quicker to decode. The stores are in a network namespace behind a link that the kernel
shapes (needs root). Needs `make install vllm-env` and `python benchmarks/peers/install.py lmcache_vllm`.

In each round every policy answers behind every link, in turns. Before each request the engine's own prefix cache and
LMCache's memory are emptied, so that hits come over the link. `exact` and `adaptive` plan with the bandwidth that they
have seen, so they get two requests after each change of the link that are not counted. A policy that takes 3 times as
long as `cold`, and more than 10 s, is asked in the first two rounds only. The result is written after every link, so a
run that is ended keeps what it has.

Rows: {prompt_tokens, link, bandwidth_bps (null: unshaped), policy, rounds, ttft_s (median), ttft_min_s, ttft_max_s,
ttft_q1_s, ttft_q3_s, cold_ttft_s, speedup_over_cold, first_ttft_after_link_change_s, reused_tokens, link_bytes (to the
engine, with packet headers), decode_tokens_per_s, answers_compared, answers_same_as_cold, answers_same_as_memory_hit,
failed_requests, failure}. An answer is compared with that of a cold run, and with that of vLLM's own prefix cache when
it reuses as many tokens. `samples` has every request. `targets` compares medians with what the connector has to reach.
"""

from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from kvstore_bench import write_results
from kvstore_bench.cli.tables import require_outputs, result_table
from kvstore_bench.demo.document import read_document
from kvstore_bench.models import model_folder
from kvstore_bench.native_dtype import native_dtype
from kvstore_bench.output_options import JsonFile, plot_option
from kvstore_bench.vllm.cli_options import DtypeName, LogsFolder, ModelName, VllmOptions
from kvstore_bench.vllm.engine import EngineOptions
from kvstore_bench.vllm.links import DEFAULT_LINKS, parse_links
from kvstore_bench.vllm.options import Options
from kvstore_bench.vllm.plot import plot_vllm
from kvstore_bench.vllm.policies import DEFAULT_POLICIES, peer_versions, policies_named
from kvstore_bench.vllm.prompts import token_ids, windows
from kvstore_bench.vllm.rows import rows_of
from kvstore_bench.vllm.run import Bench, Measured
from kvstore_bench.vllm.script import run_script
from kvstore_bench.vllm.servers import servers_behind_a_link
from kvstore_bench.vllm.targets import targets
from kvstore_service.cli.console import output, print_table
from kvstore_service.cli.stages import Stages
from kvstore_service.models import SMOLLM2

_STAGES = {"start": "starting vLLM servers", "store": "storing the prompts' KV", "ask": "asking"}
_COLUMNS = {
    "tokens": "prompt_tokens",
    "link": "link",
    "policy": "policy",
    "TTFT s": "ttft_s",
    "least": "ttft_min_s",
    "most": "ttft_max_s",
    "of": "rounds",
    "x cold": "speedup_over_cold",
    "reused": "reused_tokens",
    "MB": "MB",
    "tokens/s": "decode_tokens_per_s",
    "as cold": "as_cold",
    "as own hit": "as_hit",
    "failed": "failed_requests",
}
_DIGITS = {"speedup_over_cold": 2, "MB": 2, "decode_tokens_per_s": 1, "reused_tokens": 0, "figure": 2}


def main(
    model: ModelName = SMOLLM2,
    dtype: DtypeName = None,
    policies: Annotated[str, typer.Option(help="Comma-separated.")] = ",".join(DEFAULT_POLICIES),
    links: Annotated[str, typer.Option(help="Bandwidths, comma-separated.")] = DEFAULT_LINKS,
    tokens: Annotated[str, typer.Option(help="Lengths of prompts, comma-separated.")] = "2000,4000",
    rounds: Annotated[int, typer.Option(min=1)] = 5,
    texts: Annotated[int, typer.Option(min=1, help="Different prompts of each length.")] = 3,
    answer_tokens: Annotated[int, typer.Option(min=1, help="Length of each answer.")] = 16,
    minutes: Annotated[
        float | None, typer.Option(help="Time for all rounds. Nothing begins that is expected to end later.")
    ] = None,
    document: Annotated[
        Path | None, typer.Option(help="Text of the prompts. Default: a chapter of Python's reference.")
    ] = None,
    vllm_options: VllmOptions = "",
    logs: LogsFolder = None,
    json_file: JsonFile = None,
    plot: Annotated[Path | None, plot_option("seconds to the first token")] = None,
) -> None:
    require_outputs(json_file, plot)
    dtype = dtype or native_dtype()
    folder = model_folder(model)
    options = Options(
        model=folder,
        model_name=folder.name,
        links=parse_links(links),
        tokens=[int(part) for part in tokens.split(",")],
        rounds=rounds,
        texts=texts,
        answer_tokens=answer_tokens,
        budget_s=None if minutes is None else 60 * minutes,
        dtype=dtype,
        vllm_options=tuple(vllm_options.split()),
    )
    chosen = policies_named(policies)
    prompts = windows(token_ids(folder, read_document(document)), options.tokens, texts)
    measured = Measured()
    keep = partial(_keep, options, peer_versions(), json_file, plot)
    longest = max(options.tokens) + answer_tokens + 128
    engine = EngineOptions(folder, longest, dtype=dtype, extra=options.vllm_options)
    with (
        Stages(output(), _STAGES) as stages,
        servers_behind_a_link(chosen, engine, stages, logs) as (link, started),
    ):
        measured.left_out = started.left_out
        bench = Bench(options, link, started.running, prompts, stages, keep, measured)
        bench.prepare()
        bench.measure()
    _show(measured)


def _keep(
    options: Options,
    versions: dict[str, str | None],
    json_file: Path | None,
    plot: Path | None,
    measured: Measured,
) -> None:
    rows = rows_of(measured.samples, measured.left_out)
    said = asdict(options) | {"model": options.model_name, "complete_rounds": measured.complete_rounds}
    meta = {
        "options": said,
        "peer_versions": versions,
        "left_out": measured.left_out,
        "notes": measured.notes,
    }
    samples = [sample.row() for sample in measured.samples]
    write_results(rows, json_file, meta, targets=targets(rows), samples=samples)
    if plot is not None:
        plot_vllm(rows, plot)


def _show(measured: Measured) -> None:
    rows: list[dict[str, Any]] = [
        row
        | {
            "MB": None if row["link_bytes"] is None else row["link_bytes"] / 1e6,
            "as_cold": f"{row['answers_same_as_cold']}/{row['answers_compared']}",
            "as_hit": f"{row['answers_same_as_memory_hit']}/{row['answers_compared']}",
        }
        for row in rows_of(measured.samples, measured.left_out)
        if "link" in row
    ]
    if rows:
        print_table(result_table("seconds to the first token, medians", _COLUMNS, rows, _DIGITS))
    goals = targets(rows)
    columns = {"target": "target", "where": "where", "": "figure", "wanted": "wanted", "met?": "met"}
    if goals:
        print_table(result_table("targets of the connector", columns, goals, _DIGITS))
    for name, why in measured.left_out.items():
        print(f"without {name}: {why}")


if __name__ == "__main__":
    run_script("vllm_ttft", main)
