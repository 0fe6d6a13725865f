"""The settings of the service as options of a command."""

import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, get_args

import typer
from pydantic.fields import FieldInfo

from kvstore_service.settings import Settings, shown_default


def setting_options() -> Iterator[inspect.Parameter]:
    """One option per setting, which is None if it is not given. Options are text except switches, so that the settings
    check values from every source and report errors in one way."""
    for name, field in Settings.model_fields.items():
        kind = bool if field.annotation is bool else str
        option = typer.Option(
            help=field.description, metavar=_metavar(field), show_default=shown_default(field)
        )
        annotation: Any = Annotated[kind | None, option]
        yield inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _metavar(field: FieldInfo) -> str | None:
    kinds = {field.annotation, *get_args(field.annotation)}
    if Path in kinds:
        return "PATH"
    return "INTEGER" if int in kinds else None
