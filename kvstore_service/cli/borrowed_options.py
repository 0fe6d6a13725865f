"""Lets a command accept the options that another command declares."""

import copy
import inspect
from collections.abc import Callable, Iterator
from typing import Annotated, Any, get_args, get_origin

from kvstore_codec.errors import StartupError
from kvstore_service.cli.extensions import extension_command


def options_of(name: str, panel: str) -> Iterator[inspect.Parameter]:
    """The options of the registered command `name`, for `panel` of another command's help. An option that is not given
    is None. Without options if the command is not installed."""
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


def flag_of(command: Callable[..., None], name: str) -> str:
    """The flag of parameter `name` of `command`, such as `--json` for `json_file`."""
    option = get_args(inspect.signature(command).parameters[name].annotation)[1]
    declared = option.default if isinstance(option.default, str) else "--" + name.replace("_", "-")
    return declared.partition("/")[0]
