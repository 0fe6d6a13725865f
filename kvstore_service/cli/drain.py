"""`kvstore drain`."""

import json
import re
import time
from typing import TYPE_CHECKING, Annotated

import typer

from kvstore_api.address import DEFAULT_ADDRESS
from kvstore_codec.errors import ConfigurationError, ServiceError
from kvstore_service.cli import options

if TYPE_CHECKING:
    from kvstore_api.v1 import kvstore_pb2 as pb
    from kvstore_service.admin import ClusterAdmin

_ORDINAL = re.compile(r"-([0-9]{1,9})$")
_PERIOD_S = 0.5
# Longer than leases last and nodes take to restart. Chunks that no node accepted for so long are stuck.
_STUCK_S = 5.0


def drain(
    node: Annotated[
        str | None, typer.Argument(help="Id of the node, as `kvstore status` shows it.", show_default=False)
    ] = None,
    wait: Annotated[
        bool,
        typer.Option("--wait", help="Wait until the node has no chunks left to copy and may be removed."),
    ] = False,
    beyond: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Drain instead the live nodes whose ids end with -N, N being this number or higher: those that a "
            "StatefulSet of this size would not have.",
            show_default=False,
        ),
    ] = None,
    cancel: Annotated[
        bool, typer.Option("--cancel", help="End the draining: the node owns chunks again.")
    ] = False,
    address: options.Address = DEFAULT_ADDRESS,
    json_output: options.Json = False,
) -> None:
    """Drain a node: it stores no new chunks and copies its chunks to the other nodes."""
    from kvstore_service.admin import ClusterAdmin
    from kvstore_service.listen import Address

    if (node is None) == (beyond is None):
        raise ConfigurationError("give the id of a node, or --beyond N")
    if beyond is not None and cancel:
        raise ConfigurationError("--cancel ends the draining of one node; give its id")
    with ClusterAdmin(str(Address.parse(address))) as cluster:
        # The others must not copy chunks to one that is drained next.
        nodes = [node] if node is not None else _beyond(cluster, beyond or 0)
        for each in nodes:
            cluster.drain(each, cancel=cancel)
        left = {
            each: None if cancel else _wait(cluster, each) if wait else _left(cluster, each) for each in nodes
        }
    if json_output:
        rows = [{"node_id": each, "draining": not cancel, "left": left[each]} for each in nodes]
        typer.echo(json.dumps(rows[0] if node is not None else rows, indent=2))
        return
    for each in nodes:
        if cancel:
            typer.echo(f"{each} owns chunks again")
        elif left[each] == 0:
            typer.echo(f"{each} is drained and may be removed")
        else:
            typer.echo(
                f"{each} is draining; `kvstore status` shows how many chunks are left, --wait waits for them"
            )


def _beyond(cluster: "ClusterAdmin", size: int) -> list[str]:
    found = ((node_id, _ORDINAL.search(node_id)) for node_id in cluster.live_node_ids())
    return sorted(node_id for node_id, match in found if match is not None and int(match[1]) >= size)


def _wait(cluster: "ClusterAdmin", node_id: str) -> int:
    """Waits until the node is drained. Raises ServiceError if it dies or stops draining, or no node takes the rest."""
    from kvstore_service.cli.console import notices
    from kvstore_service.cli.stages import Stages

    most = 0
    moved_s = time.monotonic()
    with Stages(notices(), {node_id: f"draining {node_id}"}) as stages:
        while True:
            status = _status(cluster, node_id)
            if not status.member.draining:
                raise ServiceError(f"{node_id} is no longer draining: it was cancelled")
            if not status.HasField("stats"):
                raise ServiceError(
                    f"{node_id} does not answer ({status.error}); chunks that it had not copied are only on it"
                )
            left = _left_of(status)
            if left is None or left > status.stats.gauges.get("drain_stuck", 0):
                moved_s = time.monotonic()
            elif left and time.monotonic() - moved_s > _STUCK_S:
                raise ServiceError(
                    f"{node_id} has {left} chunks that no other node accepts: all are full or draining. "
                    "Add a node, or make room with `kvstore evict`; the node keeps trying until "
                    f"`kvstore drain {node_id} --cancel`"
                )
            if left is not None:
                most = max(most, left)
                stages.advance(node_id, most - left, most)
                if left == 0:
                    return 0
            time.sleep(_PERIOD_S)


def _left(cluster: "ClusterAdmin", node_id: str) -> int | None:
    return _left_of(_status(cluster, node_id))


def _left_of(status: "pb.NodeStatus") -> int | None:
    """Chunks left to copy; None until the node knows that it is draining."""
    gauges = status.stats.gauges
    return int(gauges["drain_left"]) if gauges.get("draining") else None


def _status(cluster: "ClusterAdmin", node_id: str) -> "pb.NodeStatus":
    for status in cluster.stats().nodes:
        if status.member.node_id == node_id:
            return status
    raise ServiceError(f"{node_id} has left the cluster")
