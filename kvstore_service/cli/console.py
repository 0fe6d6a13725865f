"""Output of commands: complete on any kind of output, and without control characters."""

import sys
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from kvstore_api.printable import printable

# Width in columns of a file or a pipe. Rich would use 80, or COLUMNS, and cut wider text.
_UNLIMITED = 1 << 16


class _Console(Console):
    """Console that prints text with markup but without control characters, because workers chose some of it."""

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(printable(text), **options)


def output() -> Console:
    """Console on stdout: as wide as its terminal, and of unlimited width in a file or a pipe."""
    return _Console(width=None if sys.stdout.isatty() else _UNLIMITED)


def notices() -> Console:
    """Console on stderr, for progress: as wide as its terminal, and of unlimited width in a file or a pipe."""
    return _Console(stderr=True, width=None if sys.stderr.isatty() else _UNLIMITED)


def print_table(table: Table) -> None:
    """Prints a table to stdout with every character of its cells.

    Cells wrap if the terminal is too narrow. Title and caption are separate lines, which are not wrapped.
    """
    console = output()
    title, caption = table.title, table.caption
    table.title = table.caption = None
    for column in table.columns:
        column.no_wrap = False
        column.overflow = "fold"
    if title:
        console.print(title, style="table.title", soft_wrap=True, highlight=False)
    console.print(table)
    if caption:
        console.print(caption, style="table.caption", soft_wrap=True, highlight=False)
