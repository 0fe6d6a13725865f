"""Connections whose callers have not said who they are."""

from collections import OrderedDict
from collections.abc import Hashable, Iterator
from typing import Generic, TypeVar

Connection = TypeVar("Connection", bound=Hashable)


class Strangers(Generic[Connection]):
    """Open connections whose callers have not said who they are, at most `most`. One more takes the place of another,
    the oldest one of the network with the most: who opens many closes their own, and whoever says soon who they are
    gets in. Not thread-safe."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._networks: dict[str, OrderedDict[Connection, None]] = {}
        self._network: dict[Connection, str] = {}

    def add(self, connection: Connection, network: str) -> Connection | None:
        """Adds a connection from `network` (`listen.network_of`). Returns the one that the caller must close for it."""
        out = None
        if len(self._network) >= self._most:
            crowd = max(self._networks.values(), key=len)
            out = next(iter(crowd))
            self.remove(out)
        self._networks.setdefault(network, OrderedDict())[connection] = None
        self._network[connection] = network
        return out

    def remove(self, connection: Connection) -> None:
        """Removes a connection that was identified or closed. Does nothing if it is not there."""
        network = self._network.pop(connection, None)
        if network is None:
            return
        crowd = self._networks[network]
        del crowd[connection]
        if not crowd:
            del self._networks[network]

    def __iter__(self) -> Iterator[Connection]:
        """The oldest first."""
        return iter(self._network)

    def __contains__(self, connection: Connection) -> bool:
        return connection in self._network

    def __len__(self) -> int:
        return len(self._network)
