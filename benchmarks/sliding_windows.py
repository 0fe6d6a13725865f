"""Measure what a hit reads, and its time to first token, for a model with sliding windows.

    python benchmarks/sliding_windows.py --tokens 2048,8192 --link-bps 1e9 --json F

The model has the layers of Gemma 3 (five of six with a window of 512 tokens) and random weights. Three paths alternate
with the same prompt in the same process: a full prefill, a hit that reads all KV, and a hit that reads the windows.

Rows: {tokens, layers, link_bps, path, ttft_s, ttft_min_s, ttft_max_s, bytes, bytes_needed, same_tokens}.
"""

import statistics
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, PreTrainedModel

from kvstore_bench import write_results
from kvstore_bench.first_token import FirstTokenTimer
from kvstore_bench.link.links import UNSHAPED_BPS, UserSpaceLinks, endpoints_of
from kvstore_bench.output_options import JsonFile
from kvstore_client import KVStoreClient, connect
from kvstore_client.engines.transformers import CachedModel
from kvstore_codec.model_spec import ModelSpec
from kvstore_service.embedded import EmbeddedCluster
from kvstore_service.settings import settings_of

QUESTION_TOKENS = 40
_VOCABULARY = 4096
_WINDOW = 512
_OPTIONS = {"max_new_tokens": 8, "do_sample": False}


def main(
    tokens: Annotated[
        str, typer.Option(help="Lengths of the reused document in tokens, comma-separated; multiples of 256.")
    ] = "2048,8192",
    layers: Annotated[int, typer.Option(min=6, help="Number of layers.")] = 18,
    link_bps: Annotated[float, typer.Option(min=1e6, help="Bandwidth of the link, bits per second.")] = 1e9,
    repeats: Annotated[int, typer.Option(min=1, help="Rounds after the warm-up.")] = 5,
    json_file: JsonFile = None,
) -> None:
    """Measure bytes and time to first token of hits that read all KV, and of hits that read the windows."""
    rows: list[dict[str, Any]] = []
    model = _model(layers)
    with ExitStack() as stack:
        cluster = stack.enter_context(EmbeddedCluster(settings_of(memory=4 << 30)))
        links = stack.enter_context(UserSpaceLinks())
        routes = links.routes(endpoints_of(cluster.address))
        client = stack.enter_context(connect(cluster.address, fetch_policy="fixed", routes=routes))
        cached = CachedModel(model, client)
        for length in map(int, tokens.split(",")):
            generator = torch.Generator().manual_seed(length)
            prompt = torch.randint(2, _VOCABULARY, (1, length + QUESTION_TOKENS), generator=generator)
            cached.store = True
            cached.generate(prompt[:, :length], max_new_tokens=1, do_sample=False)
            client.store.flush()
            cached.store = False
            links.set_bandwidth(link_bps)
            facts = {"tokens": length, "layers": layers, "link_bps": link_bps}
            rows += [facts | row for row in _measure(cached, prompt, repeats)]
            links.set_bandwidth(UNSHAPED_BPS)
        cached.close()
    _print(rows)
    write_results(rows, json_file)


def _model(layers: int) -> PreTrainedModel:
    """Gemma 3's kinds of layers and heads of 256, at a size that a CPU computes."""
    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=_VOCABULARY,
        hidden_size=640,
        intermediate_size=2048,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=256,
        sliding_window=_WINDOW,
        max_position_embeddings=32768,
        eos_token_id=None,
        pad_token_id=None,
    )
    return Gemma3ForCausalLM(config).eval()


def _measure(cached: CachedModel, prompt: torch.Tensor, repeats: int) -> Iterator[dict[str, Any]]:
    times: dict[str, list[float]] = {"prefill": [], "all KV": [], "windows": []}
    answers: dict[str, torch.Tensor] = {}
    read_bytes = dict.fromkeys(times, 0)
    for _ in track(range(repeats + 1), f"{prompt.shape[1]} tokens"):
        for path in times:
            first = FirstTokenTimer()
            if path == "prefill":
                answers[path] = cached.model.generate(prompt, streamer=first, **_OPTIONS)
            elif path == "windows":
                answers[path] = cached.generate(prompt, streamer=first, **_OPTIONS)
            else:
                with _reading_all(cached.client):
                    answers[path] = cached.generate(prompt, streamer=first, **_OPTIONS)
            times[path].append(first.ttft_s)
            report = cached.last_report.fetch
            if path != "prefill" and report is not None:
                read_bytes[path] = report.received_bytes
    needed = read_bytes["all KV"] * _needed_share(cached.spec, prompt.shape[1] - QUESTION_TOKENS)
    for path, all_s in times.items():
        measured_s = all_s[1:]  # the first round warms up all paths
        yield {
            "path": path,
            "ttft_s": round(statistics.median(measured_s), 4),
            "ttft_min_s": round(min(measured_s), 4),
            "ttft_max_s": round(max(measured_s), 4),
            "bytes": read_bytes[path],
            "bytes_needed": 0 if path == "prefill" else round(needed),
            "same_tokens": bool(torch.equal(answers[path], answers["prefill"])),
        }


@contextmanager
def _reading_all(client: KVStoreClient) -> Iterator[None]:
    """Read the KV outside the windows as well."""
    fetch = client.fetch

    def all_kv(*args: Any, windows: object, **options: Any) -> Any:
        del windows
        return fetch(*args, **options)

    client.fetch = all_kv  # type: ignore[method-assign]
    try:
        yield
    finally:
        client.fetch = fetch  # type: ignore[method-assign]


def _needed_share(spec: ModelSpec, tokens: int) -> float:
    """Share of the KV of `tokens` tokens that full layers and windows need."""
    needed = sum(tokens if window is None else min(tokens, window - 1) for window in spec.sliding_windows)
    return needed / (tokens * spec.layers)


def _print(rows: list[dict[str, Any]]) -> None:
    table = Table(title="time to first token of a model with sliding windows, medians")
    for column in ("tokens", "path", "TTFT (min - max)", "MB", "MB needed", "same tokens"):
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(
            str(row["tokens"]),
            row["path"],
            f"{row['ttft_s']:.3f} s ({row['ttft_min_s']:.3f} - {row['ttft_max_s']:.3f})",
            f"{row['bytes'] / 1e6:.1f}",
            f"{row['bytes_needed'] / 1e6:.1f}",
            "yes" if row["same_tokens"] else "no",
        )
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
