"""Options of a command that another command takes, too, and that only the first one declares."""

import copy
import inspect
from collections.abc import Callable, Iterator
from typing import Annotated, Any, TypeVar, get_args, get_origin

from kvstore_codec.errors import StartupError
from kvstore_service.cli.extensions import extension_command

Command = TypeVar("Command", bound=Callable[..., None])


def borrow_options(name: str, panel: str) -> Callable[[Command], Command]:
    """Adds to a command the options of the registered command `name` that it does not have itself. They come as its
    keyword arguments, None where they were not given, and stand in `panel` of its help. Without that command
    installed there are none."""

    def add(command: Command) -> Command:
        own = inspect.signature(command)
        parameters = [p for p in own.parameters.values() if p.kind is not p.VAR_KEYWORD]
        borrowed = [p for p in _options_of(name, panel) if p.name not in own.parameters]
        command.__signature__ = own.replace(parameters=[*parameters, *borrowed])  # type: ignore[attr-defined]
        return command

    return add


def flag_of(command: Callable[..., None], name: str) -> str:
    """How a person writes the option that is parameter `name` of `command`: `--json` of `json_file`."""
    option = get_args(inspect.signature(command).parameters[name].annotation)[1]
    declared = option.default if isinstance(option.default, str) else "--" + name.replace("_", "-")
    return declared.partition("/")[0]


def _options_of(name: str, panel: str) -> Iterator[inspect.Parameter]:
    try:
        command = extension_command(name)
    except StartupError:
        return
    for parameter in inspect.signature(command).parameters.values():
        if get_origin(parameter.annotation) is not Annotated:
            continue
        kind, option = get_args(parameter.annotation)
        option = copy.copy(option)
        option.rich_help_panel = panel
        if parameter.default not in (None, parameter.empty):
            option.show_default = str(parameter.default)
        optional: Any = Annotated[kind | None, option]
        yield inspect.Parameter(parameter.name, parameter.KEYWORD_ONLY, default=None, annotation=optional)
