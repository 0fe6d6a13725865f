"""A slow link with an address. Clients connect to the link instead of its target."""

import socket
import threading
from typing import Self

from kvstore_bench.shaping.connection import Connection, Direction, bound_buffers, shutdown
from kvstore_codec.errors import ConfigurationError


class ShapedLink:
    """A link with `bandwidth_bps` bits per second in each direction, and `latency_s` one way, in front of `target`.

    The directions are shaped separately. All connections of a direction share its bandwidth in turns. After a pause
    `burst_bytes` may pass at once. A sender can be ahead of the rate by one piece (2 ms of the link, at most 256 KiB)
    and the kernel's socket buffers (256 KiB requested). Latency delays bytes and the end of a stream, but not the TCP
    handshake. If the target refuses a connection, the client gets a reset.

    Accuracy on a 2-core machine (benchmarks/link_accuracy.py, transfers of 1 s): within 0.2 % from 50 Mbit/s to
    1 Gbit/s. At 5 Gbit/s it is 1.5 % slow on an idle machine and 3.5 % on a busy one, and uses a quarter of a core. The
    maximum is about 10 Gbit/s. Below 50 Mbit/s the burst is visible (+1.2 % at 10 Mbit/s). Forwarding with splice(2)
    was not cheaper. A thread that computes in pure Python in the same process takes the GIL from the link (down to
    0.2 Gbit/s), so keep both in different processes. Tensor operations do not have this effect.

    Raises ConfigurationError for an invalid target, bandwidth or latency.
    """

    def __init__(
        self, target: str, *, bandwidth_bps: float, latency_s: float = 0.0, burst_bytes: int = 16 * 1024
    ) -> None:
        if not 0 <= latency_s < float("inf"):
            raise ConfigurationError(f"the latency of a link cannot be {latency_s} s")
        self._family, self._target = _resolve(target)
        self._up = threading.Event()
        self._up.set()
        self._to_target = Direction(bandwidth_bps, burst_bytes, latency_s, self._up)
        self._from_target = Direction(bandwidth_bps, burst_bytes, latency_s, self._up)
        self._lock = threading.Lock()
        self._connections: dict[Connection, threading.Thread] = {}
        self._closed = False
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        bound_buffers(self._listener)  # accepted sockets inherit it, before they announce a window
        self.address = "{}:{}".format(*self._listener.getsockname())
        self._acceptor = threading.Thread(target=self._accept, name="link-accept", daemon=True)
        self._acceptor.start()

    @property
    def to_target_bytes(self) -> int:
        """Bytes received from clients so far, over all connections."""
        return self._to_target.pacer.reserved_bytes

    @property
    def from_target_bytes(self) -> int:
        """Bytes received from the target so far, over all connections."""
        return self._from_target.pacer.reserved_bytes

    def set_bandwidth(self, bandwidth_bps: float) -> None:
        """Changes the rate of both directions. Pieces in transit keep the previous rate."""
        self._to_target.pacer.set_rate(bandwidth_bps / 8)
        self._from_target.pacer.set_rate(bandwidth_bps / 8)

    def cut(self) -> None:
        """Cuts the link: no bytes pass in either direction, and no socket sees an error."""
        self._up.clear()

    def restore(self) -> None:
        """Restores the link. Delayed bytes are forwarded."""
        self._up.set()

    def close(self) -> None:
        """Ends all connections and stops the link. May be called more than once."""
        with self._lock:
            self._closed = True
            connections = dict(self._connections)
        shutdown(self._listener, socket.SHUT_RDWR)
        for connection in connections:
            connection.end()
        self._up.set()
        self._acceptor.join()
        self._listener.close()
        for thread in connections.values():
            thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                if not self._closed:
                    raise
                return
            with self._lock:
                if self._closed:
                    client.close()
                    return
                connection = Connection(client, self._family)
                thread = threading.Thread(target=self._serve, args=(connection,), name="link", daemon=True)
                self._connections[connection] = thread
                thread.start()

    def _serve(self, connection: Connection) -> None:
        self._up.wait()
        connection.run(self._target, self._to_target, self._from_target)
        with self._lock:
            del self._connections[connection]


def _resolve(target: str) -> tuple[int, tuple[str, int]]:
    host, _, port = target.rpartition(":")
    if not host or not port.isdigit():
        raise ConfigurationError(f"{target!r} is not host:port")
    try:
        family, _, _, _, address = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)[0]
    except (OSError, OverflowError, UnicodeError) as error:
        raise ConfigurationError(f"the link's target {target!r} cannot be resolved: {error}") from error
    return family, (str(address[0]), int(address[1]))
