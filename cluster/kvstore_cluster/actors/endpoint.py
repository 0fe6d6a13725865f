"""What the actors need to know of a server, so that this package stays free of the wire."""

from typing import Protocol


class Endpoint(Protocol):
    """A running server. `address` is the host:port others reach it at."""

    address: str

    def stop(self, grace_s: float) -> None:
        """Refuses new calls at once and gives those under way `grace_s`."""


class NodeEndpoint(Endpoint, Protocol):
    """The servers of a storage node; `bulk_address` is the host:port of its bulk port."""

    bulk_address: str
