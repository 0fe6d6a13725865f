"""`kvstore events`."""

import json
from typing import Annotated

import typer

from kvstore_api.address import DEFAULT_ADDRESS
from kvstore_codec.errors import StartupError
from kvstore_service.cli import options

_PERIOD_S = 0.5


def events(
    tenant: options.Tenant = None,
    once: Annotated[
        bool, typer.Option("--once", help="Print only which blocks are stored now, then end.")
    ] = False,
    address: options.Address = DEFAULT_ADDRESS,
) -> None:
    """Follow the KV events of a cluster as a router does, from all blocks that are stored now on. Prints a line of JSON
    for each event."""
    from kvstore_api.kv_events import Cleared, Stored
    from kvstore_service.cluster_stats import environment_connector
    from kvstore_service.listen import Address

    try:
        from kvstore_client.kv_events import EventSubscriber
    except ImportError as error:
        raise StartupError("this needs pyzmq: pip install 'kvstore-service[events]'") from error
    subscriber = EventSubscriber(
        str(Address.parse(address)), tenant=tenant or "", connector=environment_connector()
    )
    with subscriber:
        while not (once and subscriber.is_current):
            for event in subscriber.poll(_PERIOD_S):
                if isinstance(event, Cleared):
                    typer.echo(json.dumps({"event": "cleared"}))
                    continue
                kind = "stored" if isinstance(event, Stored) else "removed"
                blocks = [block.hex() for block in event.blocks]
                typer.echo(json.dumps({"event": kind, "medium": event.medium, "blocks": blocks}))
