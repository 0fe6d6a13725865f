"""`kvstore bench`: a command for each thing measured, in a file of its own."""

import typer

from kvstore_bench.cli.codec import codec
from kvstore_bench.cli.faults import faults
from kvstore_bench.cli.link import link
from kvstore_bench.cli.recompute import recompute
from kvstore_bench.cli.store import store
from kvstore_bench.cli.trace import trace

bench = typer.Typer(help="Measure this service on this machine.", no_args_is_help=True)


@bench.callback()
def _commands() -> None:
    """Keeps `bench` a command group even with a single command."""


for command in (codec, faults, link, recompute, store, trace):
    bench.command()(command)

__all__ = ["bench"]
