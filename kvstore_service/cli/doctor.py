"""`kvstore doctor`: checks of this machine."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from kvstore_codec.errors import ConfigurationError
from kvstore_service.cli.console import notices, print_table
from kvstore_service.doctor import OPTIONAL, Check, examine
from kvstore_service.models import DType
from kvstore_service.settings import EffectiveSetting, effective_settings

if TYPE_CHECKING:
    from kvstore_service.doctor.profiles import ProfileRow


def doctor(
    json_output: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    profile: Annotated[
        bool, typer.Option("--profile", help="Show the measured profiles of models on this machine.")
    ] = False,
    model: Annotated[
        str | None,
        typer.Option(
            help="With --profile: measure this model now. A folder in transformers format, or smollm2."
        ),
    ] = None,
    dtype: Annotated[
        DType, typer.Option(help="Dtype in which workers run the model; auto: as saved.")
    ] = DType.AUTO,
    config: Annotated[
        str | None, typer.Option(help="The settings file of `kvstore serve`.", metavar="PATH")
    ] = None,
) -> None:
    """Check which features work on this machine and, for those that do not, print the reason and a remedy. Then show
    the settings that `kvstore serve` would use here, and their sources.

    Exits with status 1 if an essential feature is broken, otherwise with 0.
    """
    if profile:
        _profile(model, dtype, json_output=json_output)
        return
    if model is not None:
        raise ConfigurationError("--model needs --profile: only profiles measure a model")
    with notices().status("Examining this machine ..."):
        checks = examine()
        wrong, settings = _settings(Path(config).expanduser() if config else None)
    checks += wrong
    sound = all(check.available for check in checks if check.essential)
    if json_output:
        report = {
            "sound": sound,
            "checks": [asdict(check) for check in checks],
            "settings": [asdict(setting) for setting in settings],
        }
        typer.echo(json.dumps(report, indent=2))
    else:
        print_table(_table(checks))
        if settings:
            print_table(_settings_table(settings))
    if not sound:
        raise typer.Exit(1)


def _settings(config: Path | None) -> tuple[list[Check], list[EffectiveSetting]]:
    """The settings of the service, or a failed check with the reason why they cannot be read."""
    try:
        return [], effective_settings(config)
    except ConfigurationError as error:
        remedy = "Correct them, or `kvstore serve` will not start."
        return [Check("settings", available=False, detail=str(error), remedy=remedy, essential=False)], []


def _settings_table(settings: list[EffectiveSetting]) -> Table:
    table = Table(title="What the service would be set to", title_justify="left")
    for heading in ("setting", "value", "from"):
        table.add_column(heading, overflow="fold")
    for setting in settings:
        table.add_row(setting.name, escape(setting.value), escape(setting.source))
    return table


def _profile(model: str | None, dtype: DType, *, json_output: bool) -> None:
    from kvstore_service.doctor.profiles import cached_profiles, measure

    if model is not None:
        with notices().status(f"Measuring {model}: computing, then decoding ..."):
            rows = [measure(model, dtype)]
    else:
        rows = cached_profiles()
    if json_output:
        typer.echo(json.dumps({"profiles": [asdict(row) for row in rows]}, indent=2))
    elif rows:
        for row in rows:
            print_table(_profile_table(row))
    else:
        typer.echo(
            "No model has been measured on this machine yet. A worker measures its model on first use; "
            "`kvstore doctor --profile --model smollm2` does it now."
        )


def _profile_table(row: "ProfileRow") -> Table:
    machine = ", ".join(
        str(row.machine[name]) for name in ("processor", "device") if row.machine.get(name, "cpu") != "cpu"
    )
    table = Table(
        title=escape(
            f"{row.model} {row.dtype} on {machine}, {row.machine.get('torch_threads', '?')} threads\n"
            f"prefill {row.prefill_tokens_per_s:,.0f} tokens/s, after 4,096 tokens "
            f"{row.prefill_tokens_per_s_at_4096:,.0f}\n"
            f"interference of decoding and computing {row.interference:.2f}, measured {row.measured}"
        ),
        title_justify="left",
    )
    table.add_column("encoding", no_wrap=True)
    table.add_column("decode, MB/s of KV", justify="right")
    table.add_column("restore, MB/s of KV", justify="right")
    for cost in row.encodings:
        table.add_row(cost.encoding, f"{cost.decode_mb_per_s:,.0f}", f"{cost.restore_mb_per_s:,.0f}")
    return table


def _table(checks: list[Check]) -> Table:
    table = Table(title="What this machine can do", title_justify="left")
    table.add_column("")
    table.add_column("what", no_wrap=True)
    table.add_column("found, or why not and what to do", overflow="fold")
    for check in checks:
        missing = "[red]broken[/red]" if check.essential else "[yellow]no[/yellow]"
        if check.name in OPTIONAL:
            missing = "[dim]optional[/dim]"
        remedy = f"\n[dim]{escape(check.remedy)}[/dim]" if check.remedy else ""
        table.add_row(
            "[green]yes[/green]" if check.available else missing, check.name, escape(check.detail) + remedy
        )
    return table
