"""`kvstore calibrations`."""

import json
from pathlib import Path
from typing import Annotated

import typer

from kvstore_api.address import DEFAULT_ADDRESS
from kvstore_service.cli.console import print_table


def calibrations(
    address: Annotated[
        str, typer.Option(envvar="KVSTORE_ADDRESS", help="host:port of the coordinator.")
    ] = DEFAULT_ADDRESS,
    publish: Annotated[
        Path | None,
        typer.Option(help="Add this .kvcal file first; it becomes the newest calibration of its model."),
    ] = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the calibrations of a running cluster, oldest first."""
    from rich.filesize import decimal
    from rich.table import Table

    from kvstore_service.cluster_stats import list_calibrations
    from kvstore_service.listen import Address

    coordinator = str(Address.parse(address))
    if publish is not None:
        from kvstore_service.calibration.publish import publish_calibration, read_calibration

        publish_calibration(read_calibration(publish), coordinator)
    found = list_calibrations(coordinator)
    if json_output:
        rows = [
            {
                "digest": info.digest.hex(),
                "model_digest": info.model_digest.hex(),
                "size_bytes": info.size_bytes,
            }
            for info in found
        ]
        typer.echo(json.dumps({"calibrations": rows}, indent=2))
        return
    table = Table("digest", "model", "size", title=f"calibrations at {address}")
    for info in found:
        table.add_row(info.digest.hex()[:12], info.model_digest.hex()[:12], decimal(info.size_bytes))
    print_table(table)
