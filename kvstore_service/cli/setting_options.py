"""The settings of the service as options of a command."""

import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, get_args

import typer
from pydantic.fields import FieldInfo

from kvstore_service.settings import Settings, shown_default


def setting_options() -> Iterator[inspect.Parameter]:
    """An option for each setting, None where it is not given. All but switches are text: the settings say what is
    wrong with a value, whatever place it comes from."""
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
