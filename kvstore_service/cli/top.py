"""`kvstore top`."""

import time
from typing import TYPE_CHECKING, Annotated

import typer

from kvstore_api.address import DEFAULT_ADDRESS
from kvstore_service.cli import options

if TYPE_CHECKING:
    from rich.console import RenderableType

    from kvstore_service.observability.overview import Overview

_NONE = "-"


def top(
    period_s: Annotated[
        float,
        typer.Option("--period", help="Seconds between two updates.", min=0.2, max=3600, metavar="SECONDS"),
    ] = 2.0,
    once: Annotated[bool, typer.Option("--once", help="Print one table, over one period, and end.")] = False,
    tenants: Annotated[bool, typer.Option("--tenants", help="Also show the tenants.")] = False,
    address: options.Address = DEFAULT_ADDRESS,
) -> None:
    """Show nodes, tiers, hit rate and bandwidth of a running cluster, and update them until Ctrl-C. Rates are over the
    last period."""
    from rich.live import Live

    from kvstore_codec.errors import ServiceError
    from kvstore_service.cli.console import output
    from kvstore_service.cluster_stats import cluster_stats
    from kvstore_service.listen import Address
    from kvstore_service.observability.overview import Observer

    parsed, observer, console = str(Address.parse(address)), Observer(), output()
    shown = _shown(observer.observe(cluster_stats(parsed), time.monotonic()), parsed, tenants=tenants)
    if once:
        time.sleep(period_s)
        overview = observer.observe(cluster_stats(parsed), time.monotonic())
        console.print(_shown(overview, parsed, tenants=tenants))
        return
    with Live(shown, console=console, auto_refresh=False, screen=console.is_terminal) as live:
        while True:
            live.refresh()
            time.sleep(period_s)
            try:
                reply = cluster_stats(parsed)
            except ServiceError as error:  # it may come back
                live.update(f"{error}")
                continue
            live.update(_shown(observer.observe(reply, time.monotonic()), parsed, tenants=tenants))


def _shown(overview: "Overview", address: str, *, tenants: bool) -> "RenderableType":
    from rich.console import Group
    from rich.markup import escape

    from kvstore_service.observability.overview import Health

    color = {Health.GOOD: "green", Health.WARNING: "yellow", Health.BAD: "red"}[overview.health]
    head = (
        f"[bold]{escape(address)}[/bold]  [{color}]{escape(overview.sentence)}[/{color}]\n"
        f"hit rate {_share(overview.hit_rate)}   in {_rate(overview.in_Bps)}   out {_rate(overview.out_Bps)}   "
        + "   ".join(
            f"{tier} {escape(name)} {_size(size)}" for (tier, name), size in overview.stored_bytes.items()
        )
    )
    return Group(head, _node_table(overview), *([_tenant_table(overview)] if tenants else []))


def _node_table(overview: "Overview") -> "RenderableType":
    from rich.box import SIMPLE_HEAD
    from rich.markup import escape
    from rich.table import Table

    columns = ("node", "state", "chunks", "memory", "disk", "hit rate", "in", "out", "evicted/s", "to repair")
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for name in columns:
        table.add_column(name, justify="left" if name in ("node", "state") else "right", no_wrap=True)
    colors = {"up": "green", "draining": "yellow", "down": "red"}
    for node in overview.nodes:
        state = f"[{colors[node.state]}]{node.state}[/]"
        if node.state == "down":
            table.add_row(escape(node.node_id), state, *[""] * (len(columns) - 2))
            continue
        table.add_row(
            escape(node.node_id),
            "[yellow]trouble[/]" if node.problem else state,
            f"{node.chunks:,}",
            _filled(node.memory_bytes),
            _filled(node.disk_bytes),
            _share(node.hit_rate),
            _rate(node.in_Bps),
            _rate(node.out_Bps),
            _NONE if node.evictions_per_s is None else f"{node.evictions_per_s:.1f}",
            str(node.repair_left or ""),
        )
    notes = [f"{node.node_id}: {node.problem}" for node in overview.nodes if node.problem]
    table.caption = "\n".join(map(escape, notes)) or None
    return table


def _tenant_table(overview: "Overview") -> "RenderableType":
    from rich.box import SIMPLE_HEAD
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for name in ("tenant", "stored", "of quota", "hit rate"):
        table.add_column(name, justify="left" if name == "tenant" else "right", no_wrap=True)
    for tenant in overview.tenants:
        quota = _share(tenant.stored_bytes / tenant.limit_bytes) if tenant.limit_bytes else ""
        name = escape(tenant.name) or "(default)"
        table.add_row(name, _size(tenant.stored_bytes), quota, _share(tenant.hit_rate))
    return table


def _size(size_bytes: float) -> str:
    from rich.filesize import decimal

    return decimal(int(size_bytes))


def _rate(bytes_per_s: float | None) -> str:
    return _NONE if bytes_per_s is None else f"{_size(bytes_per_s)}/s"


def _share(share: float | None) -> str:
    return _NONE if share is None else f"{share:.0%}"


def _filled(of: tuple[int, int]) -> str:
    used_bytes, limit_bytes = of
    return f"{used_bytes / limit_bytes:.0%} of {_size(limit_bytes)}" if limit_bytes else ""
