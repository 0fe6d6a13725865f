"""Shared by the commands of `kvstore bench`: tables, and checks that fail before minutes of work."""

import tempfile
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from kvstore_codec.errors import ConfigurationError, StartupError

_PICTURES = (".png", ".svg", ".pdf")


def result_table(
    title: str,
    columns: Mapping[str, str],
    rows: Sequence[Mapping[str, Any]],
    digits: Mapping[str, int] | None = None,
) -> Table:
    """A table of results. `columns` maps headings to fields of the rows. `digits` has the decimals of each float field;
    the default is 3."""
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for heading, name in columns.items():
        textual = all(isinstance(row[name], str) for row in rows)
        table.add_column(heading, justify="left" if textual else "right", no_wrap=True)
    for row in rows:
        table.add_row(*(_cell(row[name], (digits or {}).get(name, 3)) for name in columns.values()))
    return table


def targets_table(title: str, targets: Sequence[Mapping[str, Any]], *, digits: int) -> Table:
    """A table of targets, {target, where, figure, wanted, met}, and whether they were met."""
    columns = {"target": "target", "where": "where", "measured": "figure", "wanted": "wanted", "met?": "met"}
    return result_table(title, columns, targets, {"figure": digits})


def require_packages(*names: str) -> None:
    """Raises StartupError unless all these packages are installed."""
    missing = [name for name in names if find_spec(name) is None]
    if missing:
        raise StartupError(f"this benchmark needs {', '.join(missing)}: pip install 'kvstore-service[bench]'")


def require_outputs(json_file: Path | None, plot: Path | None) -> None:
    """Checks that the output files can be written, and that there is a folder for temporary files, which every
    benchmark needs. Creates missing folders. Raises ConfigurationError, or StartupError without matplotlib."""
    try:
        tempfile.gettempdir()
    except FileNotFoundError as error:
        raise ConfigurationError(f"{error.strerror}: set TMPDIR to a writable folder") from error
    if plot is not None:
        require_packages("matplotlib")
        if plot.suffix.lower() not in _PICTURES:
            raise ConfigurationError(
                f"cannot plot to {plot}: use a file name that ends in .png, .svg or .pdf"
            )
    for path in (json_file, plot):
        if path is not None:
            _require_writable(path)


def _require_writable(path: Path) -> None:
    if path.is_dir():
        raise ConfigurationError(f"{path} is a folder; use the name of a file")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise ConfigurationError(f"cannot write {path}: {error.strerror}") from error


def _cell(value: Any, digits: int) -> str:
    if value is None:
        return "-"
    return f"{value:.{digits}f}" if isinstance(value, float) else str(value)
