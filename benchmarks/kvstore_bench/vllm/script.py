"""How the scripts that measure vLLM end."""

import sys
from collections.abc import Callable

import typer

from kvstore_codec.errors import KVStoreError
from kvstore_service.signals import Stopped, StopSignals, end_by


def run_script(name: str, main: Callable[..., None]) -> None:
    """Runs a typer command. An error is shown in one line; SIGTERM and Ctrl-C end the servers first."""
    signals = StopSignals()
    signals.install()
    try:
        typer.run(main)
    except KVStoreError as error:
        sys.exit(f"{name}: {error}")
    except Stopped:
        if signals.received is not None:
            end_by(signals.received)
