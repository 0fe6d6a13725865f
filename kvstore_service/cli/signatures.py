"""Options that a command takes besides those that its own function declares."""

import inspect
from collections.abc import Callable, Iterable
from typing import TypeVar

Command = TypeVar("Command", bound=Callable[..., None])


def add_options(options: Iterable[inspect.Parameter]) -> Callable[[Command], Command]:
    """Has a command take `options`, as Typer reads them, unless it declares one of that name itself. They come as the
    command's further keyword arguments."""

    def add(command: Command) -> Command:
        own = inspect.signature(command)
        parameters = [p for p in own.parameters.values() if p.kind is not p.VAR_KEYWORD]
        added = [option for option in options if option.name not in own.parameters]
        command.__signature__ = own.replace(parameters=[*parameters, *added])  # type: ignore[attr-defined]
        return command

    return add
