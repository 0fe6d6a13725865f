"""The command line. Commands import what they need when they run, so that a plain install can show its help."""

import sys

import typer

from kvstore_codec.errors import KVStoreError
from kvstore_service.cli.bench import bench
from kvstore_service.cli.calibrate import calibrate
from kvstore_service.cli.calibrations import calibrations
from kvstore_service.cli.demo import demo
from kvstore_service.cli.doctor import doctor
from kvstore_service.cli.serve import serve
from kvstore_service.cli.status import status

app = typer.Typer(
    help="A distributed KV cache service for LLM inference.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for command in (serve, status, calibrations, doctor, calibrate, demo):
    app.command()(command)
app.add_typer(bench, name="bench")


def main() -> None:
    """Entry point of `kvstore`. What went wrong on purpose is one line on stderr and exit status 1."""
    try:
        app()
    except KVStoreError as error:
        sys.exit(f"kvstore: {error}")
