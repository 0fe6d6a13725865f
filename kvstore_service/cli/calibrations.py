"""`kvstore calibrations`."""

import json
from typing import Annotated

import typer

from kvstore_api.address import DEFAULT_ADDRESS


def calibrations(
    address: Annotated[
        str, typer.Option(envvar="KVSTORE_ADDRESS", help="host:port of the coordinator.")
    ] = DEFAULT_ADDRESS,
    json_output: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the calibrations a running cluster has, oldest first."""
    from rich.console import Console
    from rich.filesize import decimal
    from rich.table import Table

    from kvstore_service.cluster_stats import list_calibrations
    from kvstore_service.listen import Address

    found = list_calibrations(str(Address.parse(address)))
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
    Console().print(table)
