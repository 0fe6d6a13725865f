"""`kvstore tenants`."""

import json
import time
from typing import TYPE_CHECKING, Annotated

import typer

from kvstore_api.address import DEFAULT_ADDRESS
from kvstore_api.printable import printable
from kvstore_codec.errors import ServiceError
from kvstore_service.cli import options
from kvstore_service.cli.console import print_table

if TYPE_CHECKING:
    from kvstore_service.admin import ClusterAdmin

_MOST = 1 << 20
_PERIOD_S, _PATIENCE_S = 0.25, 60.0

tenants = typer.Typer(help="What tenants store, and the removal of all of it.", no_args_is_help=True)


@tenants.command("list")
def list_tenants(
    tenant: Annotated[str | None, typer.Option(help="Only this tenant; '' is the default tenant.")] = None,
    limit: Annotated[int, typer.Option(min=1, max=_MOST, help="Tenants to show.")] = 100,
    address: options.Address = DEFAULT_ADDRESS,
    json_output: options.Json = False,
) -> None:
    """Show the chunks and bytes that each tenant stores on the live nodes, replicas included, largest first."""
    from rich.filesize import decimal
    from rich.markup import escape
    from rich.table import Table

    from kvstore_service.admin import USAGE_COUNTS, ClusterAdmin
    from kvstore_service.listen import Address

    with ClusterAdmin(str(Address.parse(address))) as cluster:
        found = cluster.usage(tenant)
        quotas = {quota.tenant: quota.limit_bytes for quota in cluster.quotas()}
    found.sort(key=lambda usage: (-usage.bytes, usage.tenant))
    more, shown = len(found) > limit, found[:limit]
    if json_output:
        rows = [
            {"tenant": usage.tenant}
            | {name: getattr(usage, name) for name in USAGE_COUNTS}
            | {"quota_bytes": quotas.get(usage.tenant)}
            for usage in shown
        ]
        typer.echo(json.dumps({"tenants": rows, "more": more}, indent=2))
        return
    table = Table(title=escape(f"tenants at {address}"))
    for column in ("tenant", "chunks", "size", "in memory", "on disk", "quota"):
        table.add_column(column, justify="left" if column == "tenant" else "right")
    for usage in shown:
        quota = quotas.get(usage.tenant)
        table.add_row(
            escape(printable(usage.tenant)) or "(default)",
            str(usage.chunks),
            decimal(usage.bytes),
            decimal(usage.memory_bytes),
            decimal(usage.disk_bytes),
            decimal(quota) if quota is not None else "",
        )
    if more:
        table.caption = f"more than {limit}: --limit shows them"
    print_table(table)


@tenants.command()
def forget(
    tenant: Annotated[str, typer.Argument(help="'' is the default tenant.")],
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask for confirmation.")] = False,
    address: options.Address = DEFAULT_ADDRESS,
    json_output: options.Json = False,
) -> None:
    """Remove all chunks of a tenant from all nodes, also those that are away now, and with credentials its pins and
    canaries. Revoke the tenant's credentials first, if it should store no more."""
    from kvstore_service.admin import ClusterAdmin
    from kvstore_service.listen import Address

    name = printable(tenant) or "(default)"
    with ClusterAdmin(str(Address.parse(address))) as cluster:
        if not yes:
            typer.confirm(f"Remove all chunks of tenant {name}, on every node?", abort=True, err=True)
        away = _forgotten(cluster, tenant)
    if json_output:
        typer.echo(json.dumps({"tenant": tenant, "away": away}, indent=2))
        return
    later = f"; {', '.join(away)} will do so before serving again" if away else ""
    typer.echo(f"tenant {name} is forgotten: all live nodes have removed its chunks{later}")


def _forgotten(cluster: "ClusterAdmin", tenant: str) -> list[str]:
    """Waits until all live nodes have removed the tenant's chunks. Returns the known nodes that are not live. Raises
    ServiceError if a live node takes too long."""
    generation, waiting = cluster.forget_tenant(tenant)
    deadline_s = time.monotonic() + _PATIENCE_S
    while late := cluster.live_node_ids().intersection(waiting):
        if time.monotonic() > deadline_s:
            raise ServiceError(
                f"{', '.join(sorted(late))} did not remove the chunks within {_PATIENCE_S:.0f} s, and will go on; "
                "see the log of these nodes"
            )
        time.sleep(_PERIOD_S)
        _, waiting = cluster.forget_tenant(tenant, generation)
    return waiting
