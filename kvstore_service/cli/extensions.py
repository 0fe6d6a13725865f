"""Commands that other packages add to `kvstore`, by entry points of the group `kvstore.commands`."""

from collections.abc import Callable
from importlib.metadata import EntryPoint, entry_points
from typing import Any, NoReturn

import typer

from kvstore_codec.errors import StartupError

_GROUP = "kvstore.commands"


def add_extensions(app: typer.Typer) -> None:
    """Adds every registered command or group to `app`. One that cannot be imported says what is missing when it is
    called, so that the other commands work."""
    for entry in sorted(entry_points(group=_GROUP), key=lambda entry: entry.name):
        try:
            loaded = entry.load()
        except ImportError as error:
            _add_refusal(app, entry.name, str(error))
        else:
            _add(app, entry, loaded)


def extension(name: str) -> Callable[..., Any]:
    """The function behind a registered command. Raises StartupError where it is not installed."""
    entries = list(entry_points(group=_GROUP, name=name))
    if not entries:
        _refuse(name, "no package provides it")
    try:
        command: Callable[..., Any] = entries[0].load()
    except ImportError as error:
        _refuse(name, str(error))
    return command


def _add(app: typer.Typer, entry: EntryPoint, loaded: Any) -> None:
    if isinstance(loaded, typer.Typer):
        app.add_typer(loaded, name=entry.name)
    else:
        app.command(entry.name)(loaded)


def _add_refusal(app: typer.Typer, name: str, reason: str) -> None:
    takes_anything = {"ignore_unknown_options": True, "allow_extra_args": True}

    @app.command(
        name, help=f"Not installed: {reason}.", context_settings=takes_anything, add_help_option=False
    )
    def refuse() -> None:
        _refuse(name, reason)


def _refuse(name: str, reason: str) -> NoReturn:
    raise StartupError(f"kvstore {name} is not installed ({reason}): pip install 'kvstore-service[bench]'")
