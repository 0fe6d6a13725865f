"""`kvstore repair`."""

import json
import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvstore_api.address import DEFAULT_ADDRESS
from kvstore_codec.errors import ServiceError
from kvstore_service.cli import options

if TYPE_CHECKING:
    from kvstore_service.admin import ClusterAdmin

_PERIOD_S = 0.5


def repair(
    wait: Annotated[bool, typer.Option("--wait", help="Wait until every live node has finished.")] = False,
    address: options.Address = DEFAULT_ADDRESS,
    json_output: options.Json = False,
) -> None:
    """Make every node check now that its chunks are on all of their owners, and copy the missing ones."""
    from kvstore_service.admin import ClusterAdmin
    from kvstore_service.listen import Address

    with ClusterAdmin(str(Address.parse(address))) as cluster:
        before = _copies(cluster)
        number = cluster.repair()
        if not wait:
            if json_output:
                typer.echo(json.dumps({"round": number}, indent=2))
            else:
                typer.echo(f"repair round {number} has started; --wait waits for it")
            return
        nodes = _wait(cluster, number)
        sent = {name: copies - before.get(name, 0) for name, copies in _copies(cluster).items()}
    rows: list[dict[str, Any]] = [
        {"node_id": name, "checked": nodes.get(name, 0), "copies_sent": sent[name]} for name in sorted(sent)
    ]
    if json_output:
        typer.echo(json.dumps({"round": number, "nodes": rows}, indent=2))
        return
    copies = sum(row["copies_sent"] for row in rows)
    typer.echo(f"round {number} of repair: {sum(nodes.values())} chunks checked, {copies} copies sent")


def _wait(cluster: "ClusterAdmin", number: int) -> dict[str, int]:
    """Waits for the round. Returns the number of chunks that each node checked; raises ServiceError without a node."""
    from kvstore_service.cli.console import notices
    from kvstore_service.cli.stages import Stages

    with Stages(notices(), {"repair": f"repair, round {number}"}) as stages:
        while True:
            checked: dict[str, int] = {}
            total = waiting = 0
            for node in cluster.stats().nodes:
                if not node.HasField("stats"):
                    continue
                gauges = node.stats.gauges
                done = gauges.get("repair_round", 0) >= number
                waiting += not done
                total += gauges.get("repair_total", 0)
                checked[node.member.node_id] = gauges.get("repair_checked", 0)
            if not checked:
                raise ServiceError("no storage node answers, so no chunk was repaired; see `kvstore status`")
            stages.advance("repair", sum(checked.values()), total)
            if not waiting:
                return checked
            time.sleep(_PERIOD_S)


def _copies(cluster: "ClusterAdmin") -> dict[str, int]:
    return {
        node.member.node_id: node.stats.counters.get("repair_sent", 0)
        for node in cluster.stats().nodes
        if node.HasField("stats")
    }
