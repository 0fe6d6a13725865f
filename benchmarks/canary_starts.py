"""Count false alarms of the canary: start workers that run the same model in different ways, each a new process.

    nice -n 19 python benchmarks/canary_starts.py --starts 200 --json F

Starts differ in model, dtype, threads, attention, torch.compile and the instruction sets that libraries may use. After
every 50 starts all canaries are replaced, so that canaries are made in different ways; within these 50, starts with the
same instruction set follow each other. A storage node and a coordinator run in this process, behind their gRPC servers.

Rows: {round, model, dtype, threads, attention, compile, isa, reason, difference, tolerance, share, layer, kind,
probe_s, reused_tokens, ...}; `share` is difference / tolerance. A share above 1 is a false alarm. A `reason` of
canary_failed is none: there the model itself cannot run (inductor compiles nothing for `aten default` on some
processors).
"""

import itertools
import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any, Self

import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from kvstore_bench import write_results
from kvstore_bench.output_options import JsonFile
from kvstore_service.admin import ClusterAdmin
from tests.client.conftest import served_cluster

ROOT = Path(__file__).parents[1]
ROUND = 50
# Environment variables that limit the instruction sets, to simulate other processors. Libraries never use instructions
# that the processor does not have.
ISAS: dict[str, dict[str, str]] = {
    "all": {},
    "onednn sse41": {"ONEDNN_MAX_CPU_ISA": "SSE41"},
    "onednn avx2": {"ONEDNN_MAX_CPU_ISA": "AVX2"},
    "onednn avx512": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE"},
    "onednn avx512_bf16": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"},
    "onednn amx": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_AMX"},
    "aten default": {"ATEN_CPU_CAPABILITY": "default"},
    "aten avx2": {"ATEN_CPU_CAPABILITY": "avx2"},
    "mkl compatible": {"MKL_CBWR": "COMPATIBLE"},
}


def starts(count: int, seed: int) -> Iterator[dict[str, Any]]:
    """Yields `count` starts, the same for the same seed. A tenth run SmolLM2, of which a quarter in bfloat16. A
    twentieth are compiled."""
    chosen = random.Random(seed)
    tiny = itertools.cycle(("llama", "gemma3", "qwen3", "llama3-rope", "mistral"))
    for number in range(count):
        name = "smollm2" if number % 10 == 0 else next(tiny)
        # Few of SmolLM2 in bfloat16, because without instructions for bfloat16 such a start takes minutes.
        dtype = chosen.choice(("float32", "bfloat16"))
        if name == "smollm2":
            dtype = "bfloat16" if number % 40 == 0 else "float32"
        compiled = number % 20 == 5
        yield {
            "start": number,
            "round": number // ROUND,
            "model": name,
            "dtype": dtype,
            "threads": chosen.choice((1, 2)),
            "attention": chosen.choice(("eager", "sdpa")),
            "compile": chosen.choice(("aot_eager", "inductor")) if compiled else None,
            "isa": chosen.choice(list(ISAS)),
        }


def main(
    count: Annotated[int, typer.Option("--starts", min=1, help="Number of starts.")] = 200,
    seed: Annotated[int, typer.Option(help="Seed of the choice of starts.")] = 0,
    json_file: JsonFile = None,
) -> None:
    """Count false alarms of the canary."""
    rows: list[dict[str, Any]] = []
    order = sorted(starts(count, seed), key=lambda start: (start["round"], start["isa"], start["start"]))
    with TemporaryDirectory() as folder, served_cluster(Path(folder)) as cluster, Starter() as starter:
        for start in track(order, "starts", console=Console(stderr=True)):
            if rows and start["round"] != rows[-1]["round"]:
                _replace_all(cluster.address)
            rows.append(start | starter.start(start | {"address": cluster.address}))
            write_results(rows, json_file)  # after each start, so that an interruption loses nothing
    _print(rows)


class Starter:
    """Context manager. Starts workers by forking them from a process with the instruction set of the start. Keeps one
    such process at a time."""

    def __init__(self) -> None:
        self._isa: str | None = None
        self._process: subprocess.Popen[str] | None = None

    def start(self, start: dict[str, Any]) -> dict[str, Any]:
        """Starts a worker. Blocks until it ends. Returns what it measured."""
        if self._process is None or self._isa != start["isa"]:
            self.close()
            self._isa = start["isa"]
            self._process = subprocess.Popen(
                [sys.executable, Path(__file__).with_name("canary_start.py")],
                env=os.environ | {"PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"} | ISAS[self._isa],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            )  # fmt: skip
        assert self._process.stdin is not None  # noqa: S101  # both are pipes
        assert self._process.stdout is not None  # noqa: S101
        self._process.stdin.write(json.dumps(start) + "\n")
        self._process.stdin.flush()
        found: dict[str, Any] = json.loads(self._process.stdout.readline())
        known = found["difference"] is not None
        return found | {"share": found["difference"] / found["tolerance"] if known else None}

    def close(self) -> None:
        if self._process is not None and self._process.stdin is not None:
            self._process.stdin.close()
            self._process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _replace_all(address: str) -> None:
    with ClusterAdmin(address) as admin:
        for model in admin.models():
            admin.replace_canary(model.model_digest)


def _print(rows: list[dict[str, Any]]) -> None:
    table = Table(
        "model",
        "dtype",
        "starts",
        "cannot run",
        "false alarms",
        "worst difference / tolerance",
        "in the start",
        "probe, s (median)",
    )
    for model, dtype in sorted({(row["model"], row["dtype"]) for row in rows}):
        chosen = [row for row in rows if (row["model"], row["dtype"]) == (model, dtype)]
        worst = max(chosen, key=lambda row: row["share"] or 0)
        way = ", ".join(str(worst[name]) for name in ("attention", "compile", "isa", "threads"))
        seconds = sorted(row["probe_s"] for row in chosen)[len(chosen) // 2]
        failed, alarms = sum(map(_cannot_run, chosen)), sum(map(_is_alarm, chosen))
        table.add_row(
            model,
            dtype,
            str(len(chosen)),
            str(failed),
            str(alarms),
            f"{worst['share'] or 0:.2f}",
            way,
            f"{seconds:.2f}",
        )
    Console().print(table)
    failed, alarms = sum(map(_cannot_run, rows)), sum(map(_is_alarm, rows))
    print(f"{alarms} false alarms in {len(rows)} starts, {failed} of which could not run the model")


def _cannot_run(row: dict[str, Any]) -> bool:
    return bool(row["reason"] == "canary_failed")


def _is_alarm(row: dict[str, Any]) -> bool:
    return row["reason"] is not None and not _cannot_run(row)


if __name__ == "__main__":
    typer.run(main)
