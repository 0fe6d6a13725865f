"""The interface of a server for the actors, so that this package does not depend on gRPC."""

from typing import Protocol


class Endpoint(Protocol):
    """A running server. `address` is the host:port at which other processes reach it."""

    address: str

    def stop(self, grace_s: float) -> None:
        """Refuses new calls at once, and lets running calls finish for up to `grace_s`."""


class NodeEndpoint(Endpoint, Protocol):
    """The servers of a storage node. `bulk_address` is the host:port of its bulk server."""

    bulk_address: str


def do_nothing() -> None:
    """The default of what prepares an actor's process."""
