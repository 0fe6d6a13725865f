"""Command-line options for the result files of a benchmark."""

from pathlib import Path
from typing import Annotated, Any

import typer

JsonFile = Annotated[Path | None, typer.Option("--json", help="Write the result to this file.")]


def plot_option(what: str) -> Any:
    """The option `--plot`; `what` says what the plot shows."""
    return typer.Option("--plot", help=f"Write a plot of {what} to this file (.png, .svg or .pdf).")
