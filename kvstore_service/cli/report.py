"""`kvstore report`."""

import time
from pathlib import Path
from typing import Annotated

import typer

from kvstore_api.address import DEFAULT_ADDRESS
from kvstore_api.printable import printable
from kvstore_codec.errors import ConfigurationError
from kvstore_service.cli import options


def report(
    output: Annotated[
        str | None,
        typer.Option(
            "--output",
            help="The archive to write.",
            metavar="PATH",
            show_default="kvstore-report-TIME.tar.gz",
        ),
    ] = None,
    config: Annotated[
        str | None, typer.Option(help="The settings file of `kvstore serve`.", metavar="PATH")
    ] = None,
    address: options.Address = DEFAULT_ADDRESS,
) -> None:
    """Write one archive for a support ticket: versions, health, settings, metrics, models, the latest log lines of all
    processes, and the checks of `kvstore doctor`. It has no secrets, keys, values or tokens of prompts. Parts that
    cannot be made, because the cluster does not answer, are left out and named."""
    from kvstore_service.cli.console import notices
    from kvstore_service.listen import Address
    from kvstore_service.observability.report import write_report

    parsed = str(Address.parse(address))
    path = Path(output or time.strftime("kvstore-report-%Y%m%d-%H%M%S.tar.gz", time.gmtime())).expanduser()
    try:
        with notices().status("Collecting ..."):
            missing = write_report(path, parsed, Path(config).expanduser() if config else None)
    except OSError as error:
        raise ConfigurationError(f"cannot write {path}: {error.strerror}") from error
    for part, reason in missing.items():
        typer.echo(printable(f"kvstore: the report has no {part}: {reason}"), err=True)
    typer.echo(str(path))
