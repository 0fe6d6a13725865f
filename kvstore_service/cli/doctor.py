"""`kvstore doctor`: what this machine can do."""

import json
from dataclasses import asdict
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from kvstore_service.doctor import Check, examine


def doctor(
    json_output: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Say what this machine can do and, for what is missing, why and what to do.

    Exits with 1 when something essential is broken, with 0 otherwise.
    """
    with Console(stderr=True).status("Examining this machine ..."):
        checks = examine()
    sound = all(check.available for check in checks if check.essential)
    if json_output:
        typer.echo(json.dumps({"sound": sound, "checks": [asdict(check) for check in checks]}, indent=2))
    else:
        Console().print(_table(checks))
    if not sound:
        raise typer.Exit(1)


def _table(checks: list[Check]) -> Table:
    table = Table(title="What this machine can do", title_justify="left")
    table.add_column("")
    table.add_column("what", no_wrap=True)
    table.add_column("found, or why not and what to do", overflow="fold")
    for check in checks:
        missing = "[red]broken[/red]" if check.essential else "[yellow]no[/yellow]"
        remedy = f"\n[dim]{escape(check.remedy)}[/dim]" if check.remedy else ""
        table.add_row(
            "[green]yes[/green]" if check.available else missing, check.name, escape(check.detail) + remedy
        )
    return table
