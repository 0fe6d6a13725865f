"""`kvstore bench`: a command for each thing measured, in a file of its own."""

from typing import Any

import typer
from typer.core import TyperGroup

from kvstore_bench.cli.codec import codec
from kvstore_bench.cli.faults import faults
from kvstore_bench.cli.link import link
from kvstore_bench.cli.recompute import recompute
from kvstore_bench.cli.reprefill import reprefill
from kvstore_bench.cli.store import store
from kvstore_bench.cli.trace import trace
from kvstore_codec.errors import ConfigurationError


class _Benchmarks(TyperGroup):
    """The group `kvstore bench`. Its error for an unknown benchmark lists the known ones."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args and not args[0].startswith("-") and args[0] not in self.commands:
            raise ConfigurationError(
                f"there is no benchmark {args[0]!r}; benchmarks: {', '.join(self.list_commands(ctx))}"
            )
        return super().resolve_command(ctx, args)


bench = typer.Typer(cls=_Benchmarks, help="Measure this service on this machine.", no_args_is_help=True)


@bench.callback()
def _commands() -> None:
    """Keeps `bench` a command group even with a single command."""


for command in (codec, faults, link, recompute, reprefill, store, trace):
    bench.command()(command)

__all__ = ["bench"]
