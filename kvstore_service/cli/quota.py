"""`kvstore quota`."""

import json
from typing import Annotated

import typer

from kvstore_api.address import DEFAULT_ADDRESS
from kvstore_codec.errors import ConfigurationError
from kvstore_service.cli import options
from kvstore_service.cli.console import print_table


def quota(
    tenant: Annotated[str | None, typer.Argument(help="'' is the default tenant.")] = None,
    size: Annotated[str | None, typer.Argument(help="A size such as 20GiB; 0 removes the quota.")] = None,
    address: options.Address = DEFAULT_ADDRESS,
    json_output: options.Json = False,
) -> None:
    """Limit the bytes of a tenant in the whole cluster, replicas included. Without arguments, list the quotas."""
    from rich.filesize import decimal
    from rich.markup import escape
    from rich.table import Table

    from kvstore_service.admin import ClusterAdmin
    from kvstore_service.listen import Address

    if tenant is not None and size is None:
        raise ConfigurationError(f"a quota for tenant {tenant!r} needs a size, such as 20GiB")
    limit_bytes = None if size is None else _size(size)
    with ClusterAdmin(str(Address.parse(address))) as cluster:
        if tenant is not None and limit_bytes is not None:
            cluster.set_quota(tenant, limit_bytes)
        quotas = cluster.quotas()
    if json_output:
        rows = [{"tenant": found.tenant, "limit_bytes": found.limit_bytes} for found in quotas]
        typer.echo(json.dumps({"quotas": rows}, indent=2))
        return
    table = Table("tenant", "limit", title=escape(f"quotas at {address}"))
    for found in quotas:
        table.add_row(escape(found.tenant) or "(default)", decimal(found.limit_bytes))
    print_table(table)


def _size(text: str) -> int:
    from pydantic import ByteSize, TypeAdapter, ValidationError

    try:
        size_bytes = int(TypeAdapter(ByteSize).validate_python(text))
    except ValidationError as error:
        raise ConfigurationError(
            f"{text!r} is not a size; write a number of bytes, or for example 20GiB"
        ) from error
    if not 0 <= size_bytes < 1 << 64:
        raise ConfigurationError(f"{text!r} is not a valid size for a quota")
    return size_bytes
