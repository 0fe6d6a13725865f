"""Where commands print what they found: whole, whatever it is printed to, and nothing that the terminal would obey."""

import sys
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from kvstore_api.printable import printable

# Columns of a file or a pipe. Rich would take 80, or COLUMNS, and cut what is wider.
_UNLIMITED = 1 << 16


class _Console(Console):
    """Prints the text that it is given, with markup; much of it was chosen by workers."""

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

    Cells are folded into several lines where a terminal is too narrow. Title and caption are lines of their own,
    as long as they are.
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
