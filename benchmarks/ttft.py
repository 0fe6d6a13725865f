"""Measure the time to first token: full prefill and a hit alternate, with the same prompt in the same process.

    python benchmarks/ttft.py --tokens 2048,4096 --dtype float32,bfloat16 --json F --plot F.png

Rows: {tokens, dtype, link, path, ttft_s, ttft_min_s, ttft_max_s, speedup, tokens_reused, bytes, same_tokens}.
"""

import statistics
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from kvstore_bench import write_results
from kvstore_bench.demo.document import read_document
from kvstore_bench.first_token import FirstTokenTimer
from kvstore_bench.output_options import JsonFile, plot_option
from kvstore_client import connect
from kvstore_client.engines.transformers import CachedModel
from kvstore_service.embedded import EmbeddedCluster
from kvstore_service.models import load_smollm2
from kvstore_service.settings import settings_of

QUESTION_TOKENS = 40


def main(
    tokens: Annotated[
        str, typer.Option(help="Lengths of the reused document in tokens, comma-separated.")
    ] = "2048,4096",
    dtypes: Annotated[
        str, typer.Option("--dtype", help="Dtypes of model and KV, comma-separated.")
    ] = "float32,bfloat16",
    repeats: Annotated[int, typer.Option(min=1, help="Rounds after the warm-up.")] = 7,
    json_file: JsonFile = None,
    plot: Annotated[Path | None, plot_option("time to first token")] = None,
) -> None:
    """Measure the time to first token of a full prefill and of a hit."""
    rows: list[dict[str, Any]] = []
    with ExitStack() as stack:
        cluster = stack.enter_context(EmbeddedCluster(settings_of(memory=4 << 30)))
        client = stack.enter_context(connect(cluster.address, fetch_policy="fixed"))
        for dtype in dtypes.split(","):
            model, tokenizer = load_smollm2(getattr(torch, dtype))
            text = tokenizer(read_document(None), add_special_tokens=False, return_tensors="pt").input_ids
            cached = CachedModel(model, client)
            for length in map(int, tokens.split(",")):
                prompt = text[:, : length + QUESTION_TOKENS]
                if prompt.shape[1] < length + QUESTION_TOKENS:
                    raise typer.BadParameter(
                        f"the document has only {text.shape[1]} tokens, including the question",
                        param_hint="--tokens",
                    )
                rows += _measure(cached, prompt, length, dtype, repeats)
            cached.close()
    _print(rows)
    write_results(rows, json_file)
    if plot:
        _plot(rows, plot)


def _measure(
    cached: CachedModel, prompt: torch.Tensor, length: int, dtype: str, repeats: int
) -> list[dict[str, Any]]:
    cached.generate(prompt[:, :length], max_new_tokens=1, do_sample=False)
    cached.client.store.flush()
    cached.store = False
    times: dict[str, list[float]] = {"cold": [], "hit": []}
    answers: dict[str, torch.Tensor] = {}
    for _ in track(range(repeats + 1), f"{length} tokens, {dtype}"):
        for path, engine in (("cold", cached.model), ("hit", cached)):
            first = FirstTokenTimer()
            answers[path] = engine.generate(prompt, streamer=first, max_new_tokens=8, do_sample=False)
            times[path].append(first.ttft_s)
    cached.store = True
    report = cached.last_report
    cold_s = statistics.median(times["cold"][1:])
    rows = []
    for path, all_s in times.items():
        measured_s = all_s[1:]  # the first round warms up both paths
        hit = path == "hit"
        rows.append(
            {
                "tokens": length,
                "dtype": dtype,
                "link": "unshaped",
                "path": path,
                "ttft_s": round(statistics.median(measured_s), 4),
                "ttft_min_s": round(min(measured_s), 4),
                "ttft_max_s": round(max(measured_s), 4),
                "speedup": round(cold_s / statistics.median(measured_s), 2),
                "tokens_reused": report.reused_tokens if hit else 0,
                "bytes": report.fetch.received_bytes if hit and report.fetch else 0,
                "same_tokens": bool(torch.equal(answers[path], answers["cold"])),
            }
        )
    return rows


def _print(rows: list[dict[str, Any]]) -> None:
    table = Table(title="time to first token, unshaped link, medians")
    for column in ("tokens", "dtype", "path", "TTFT (min - max)", "speed-up", "reused", "MB", "same tokens"):
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(
            str(row["tokens"]), row["dtype"], row["path"],
            f"{row['ttft_s']:.3f} s ({row['ttft_min_s']:.3f} - {row['ttft_max_s']:.3f})",
            f"{row['speedup']:.1f}x", str(row["tokens_reused"]), f"{row['bytes'] / 1e6:.1f}",
            "yes" if row["same_tokens"] else "no",
        )  # fmt: skip
    Console().print(table)


def _plot(rows: list[dict[str, Any]], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 3.5))
    groups = list(dict.fromkeys(f"{row['tokens']} tokens\n{row['dtype']}" for row in rows))
    for offset, kind in ((-0.2, "cold"), (0.2, "hit")):
        chosen = [row for row in rows if row["path"] == kind]
        seconds = [row["ttft_s"] for row in chosen]
        spread = [
            [r["ttft_s"] - r["ttft_min_s"] for r in chosen],
            [r["ttft_max_s"] - r["ttft_s"] for r in chosen],
        ]
        places = [place + offset for place in range(len(groups))]
        bars = axes.bar(places, seconds, 0.4, yerr=spread, capsize=3, label=kind)
        if kind == "hit":
            axes.bar_label(bars, [f"{row['speedup']:.1f}x" for row in chosen], padding=3)
    axes.set_xticks(range(len(groups)), groups)
    axes.set_ylabel("seconds to first token")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=140)


if __name__ == "__main__":
    typer.run(main)
