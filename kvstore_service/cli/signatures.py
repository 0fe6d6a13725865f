"""Adds options to a command beyond the parameters of its function."""

import inspect
from collections.abc import Callable, Iterable
from typing import TypeVar

Command = TypeVar("Command", bound=Callable[..., None])


def add_options(options: Iterable[inspect.Parameter]) -> Callable[[Command], Command]:
    """Adds `options` to the signature of a command that Typer reads, except those that the command declares itself. The
    command receives them as keyword arguments."""

    def add(command: Command) -> Command:
        own = inspect.signature(command)
        parameters = [p for p in own.parameters.values() if p.kind is not p.VAR_KEYWORD]
        added = [option for option in options if option.name not in own.parameters]
        command.__signature__ = own.replace(parameters=[*parameters, *added])  # type: ignore[attr-defined]
        return command

    return add
