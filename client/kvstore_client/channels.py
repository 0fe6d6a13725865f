"""The gRPC channels of a client: one to each address in use."""

import ctypes
import threading
import time
from collections.abc import Collection, Iterable, Mapping

import grpc

from kvstore_client.connector import Connector
from kvstore_client.fork import GATE
from kvstore_codec.errors import NodeUnavailableError

_OPTIONS = [
    ("grpc.max_receive_message_length", 64 << 20),
    ("grpc.max_send_message_length", 8 << 20),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
    # A forked child's channel must not reuse the connection of the parent's channel.
    ("grpc.use_local_subchannel_pool", 1),
]


class Channels:
    """Opens channels on first use, until `close`. Thread-safe."""

    def __init__(self, connector: Connector, routes: Mapping[str, str], *, longest_call_s: float) -> None:
        """`routes` maps addresses to the addresses to dial instead. No call begins on a channel returned more than
        `longest_call_s` ago, and no call lasts longer."""
        self._connector, self._routes, self._longest_call_s = connector, routes, longest_call_s
        self._lock = threading.Lock()
        self._closed = False
        self._open: dict[str, tuple[grpc.Channel, grpc.Channel]] = {}
        """By address: the channel, and the intercepted channel for calls."""
        self._changes = connector.changes
        """Those of the connector when the open channels were opened."""
        self._retired: list[tuple[float, grpc.Channel]] = []
        """Channels to addresses no longer in use, and until when they may still be called."""

    def to(self, address: str) -> grpc.Channel:
        """The channel to an address. Raises NodeUnavailableError after `close`."""
        with self._lock:
            if self._closed:
                raise NodeUnavailableError(f"{address} is not called: the client was closed")
            if self._connector.uses_tls and self._changes != (changes := self._connector.changes):
                # The client has a new certificate, or knows the servers by another one.
                self._changes = changes
                self._retire(list(self._open))
            if address not in self._open:
                channel = self._connector.channel(self._routes.get(address, address), _OPTIONS)
                self._open[address] = channel, grpc.intercept_channel(channel, GATE)
            return self._open[address][1]

    def keep(self, addresses: Collection[str]) -> None:
        """Retire the channels to all other addresses; each is closed when its last call must have ended."""
        now_s = time.monotonic()
        with self._lock:
            self._retire(self._open.keys() - set(addresses))
            over = [channel for until_s, channel in self._retired if until_s <= now_s]
            self._retired = [retired for retired in self._retired if retired[0] > now_s]
        for channel in over:
            channel.close()

    def _retire(self, addresses: Iterable[str]) -> None:
        until_s = time.monotonic() + 2 * self._longest_call_s
        for address in addresses:
            self._retired.append((until_s, self._open.pop(address)[0]))

    def __len__(self) -> int:
        """Number of channels to addresses in use."""
        with self._lock:
            return len(self._open)

    def close(self) -> None:
        """End all calls. Later calls are unavailable."""
        with self._lock:
            self._closed = True
            channels = [channel for channel, _ in self._open.values()]
            channels += [channel for _, channel in self._retired]
            self._open.clear()
            self._retired.clear()
        for channel in channels:
            channel.close()

    def leave_to_parent(self) -> None:
        """In a forked child: keep gRPC's objects alive, because destroying them would end the parent's connections."""
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(self))
