"""What the commands of `kvstore bench` share: tables, and what is checked before minutes of work."""

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
    """`columns` are fields of the rows by heading; floats show the `digits` of their field, or three."""
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for heading, name in columns.items():
        textual = all(isinstance(row[name], str) for row in rows)
        table.add_column(heading, justify="left" if textual else "right", no_wrap=True)
    for row in rows:
        table.add_row(*(_cell(row[name], (digits or {}).get(name, 3)) for name in columns.values()))
    return table


def require_packages(*names: str) -> None:
    """Raises StartupError unless all of them are installed."""
    missing = [name for name in names if find_spec(name) is None]
    if missing:
        raise StartupError(f"this benchmark needs {', '.join(missing)}: pip install 'kvstore-service[bench]'")


def require_outputs(json_file: Path | None, plot: Path | None) -> None:
    """Raises ConfigurationError now rather than after minutes of work, StartupError where nothing draws. Looks for the
    folder of temporary files as well: every benchmark needs some."""
    try:
        tempfile.gettempdir()
    except FileNotFoundError as error:
        raise ConfigurationError(f"{error.strerror}: set TMPDIR to a writable folder") from error
    if plot is not None:
        require_packages("matplotlib")
        if plot.suffix.lower() not in _PICTURES:
            raise ConfigurationError(f"{plot} is no picture; name a .png, .svg or .pdf")
    for path in (json_file, plot):
        if path is not None:
            _require_writable(path)


def _require_writable(path: Path) -> None:
    if path.is_dir():
        raise ConfigurationError(f"{path} is a folder; name a file in it")
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
