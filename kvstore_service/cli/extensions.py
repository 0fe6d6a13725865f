"""Commands that other packages add to `kvstore`."""

from collections.abc import Callable
from typing import Any, NoReturn

import typer

from kvstore_codec.errors import StartupError
from kvstore_service.extensions import INSTALL, Group, load_extensions

_GROUP: Group = "kvstore.commands"


def add_extensions(app: typer.Typer) -> None:
    """Adds every registered command or group to `app`. A command that cannot be imported reports the missing package
    when it is called, so that the other commands still work."""
    for extension in load_extensions(_GROUP):
        if extension.reason:
            _add_refusal(app, extension.name, extension.reason)
        elif isinstance(extension.value, typer.Typer):
            app.add_typer(extension.value, name=extension.name)
        else:
            app.command(extension.name)(extension.value)


def extension_command(name: str) -> Callable[..., Any]:
    """The function of a registered command. Raises StartupError if it is not installed."""
    found = {extension.name: extension for extension in load_extensions(_GROUP)}
    if name not in found:
        _refuse(name, "no package provides it")
    if found[name].reason:
        _refuse(name, found[name].reason)
    command: Callable[..., Any] = found[name].value
    return command


def _add_refusal(app: typer.Typer, name: str, reason: str) -> None:
    takes_anything = {"ignore_unknown_options": True, "allow_extra_args": True}

    @app.command(
        name, help=f"Not installed: {reason}.", context_settings=takes_anything, add_help_option=False
    )
    def refuse() -> None:
        _refuse(name, reason)


def _refuse(name: str, reason: str) -> NoReturn:
    raise StartupError(f"kvstore {name} is not installed ({reason}): {INSTALL}")
