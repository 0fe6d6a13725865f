"""Measure what the canary detects: the effect on KV of model changes that leave the digest of the weights unchanged.

    nice -n 19 python benchmarks/canary_changes.py --json F

Rows: {model, dtype, change, difference, tolerance, share, layer, kind, probe_s}; `share` is difference / tolerance. A
change with a share above 1 is detected. `probe_s` is the time of the unchanged model's probe in one thread.
"""

import copy
import time
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from kvstore_bench import write_results
from kvstore_bench.output_options import JsonFile
from kvstore_client.engines.transformers.capture import install_hooks
from kvstore_client.engines.transformers.probe import probe_for, run_probe
from kvstore_client.engines.transformers.spec import spec_of
from kvstore_client.threads import single_threaded
from kvstore_codec.canary.compare import compare
from kvstore_service.models import load_smollm2
from tests.client.canary_changes import CHANGES
from tests.client.models import tiny_model


def main(
    models: Annotated[
        str, typer.Option(help="Comma-separated: smollm2, and families of tiny random models.")
    ] = "llama,smollm2",
    dtypes: Annotated[str, typer.Option("--dtype", help="Comma-separated.")] = "float32,bfloat16",
    json_file: JsonFile = None,
) -> None:
    """Measure what the canary detects. The table shows difference / tolerance."""
    rows: list[dict[str, Any]] = []
    torch.ones(1).cos()
    cells = [(name, dtype) for name in models.split(",") for dtype in dtypes.split(",")]
    for name, dtype in cells:
        rows += _measured(name, dtype)
        write_results(rows, json_file)
    _print(rows)


@single_threaded()
def _measured(name: str, dtype: str) -> list[dict[str, Any]]:
    kind = getattr(torch, dtype)
    plain = load_smollm2(kind)[0] if name == "smollm2" else tiny_model(name, kind)
    spec, probe = spec_of(plain), probe_for(plain)
    rows = []
    untouched = copy.deepcopy(plain)
    install_hooks(untouched)
    begin_s = time.perf_counter()
    kept = run_probe(untouched, spec, probe)
    probe_s = time.perf_counter() - begin_s
    for change, apply in track(CHANGES.items(), f"{name}, {dtype}", console=Console(stderr=True)):
        model = copy.deepcopy(plain)
        apply(model)
        install_hooks(model)
        found = compare(run_probe(model, spec, probe), kept, spec)
        rows.append(
            {
                "model": name,
                "dtype": dtype,
                "change": change,
                "difference": found.difference,
                "tolerance": found.tolerance,
                "share": found.difference / found.tolerance,
                "layer": found.layer,
                "kind": found.kind,
                "probe_s": round(probe_s, 3),
            }
        )
    return rows


def _print(rows: list[dict[str, Any]]) -> None:
    table = Table("change", *(f"{m}, {d}" for m, d in dict.fromkeys((r["model"], r["dtype"]) for r in rows)))
    for change in dict.fromkeys(row["change"] for row in rows):
        table.add_row(change, *(f"{row['share']:.3g}" for row in rows if row["change"] == change))
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
