"""A link with an address: clients connect to it instead of to the target."""

import socket
import threading
from typing import Self

from kvstore_bench.shaping.connection import Connection, Direction, bound_buffers, shutdown
from kvstore_codec.errors import ConfigurationError


class ShapedLink:
    """A link of `bandwidth_bps` bits per second each way, and `latency_s` one way, in front of `target`.

    Both directions are shaped apart; all connections of a direction share its bandwidth, in turns. After a
    pause `burst_bytes` may pass at once. What a sender can push ahead of the rate is one piece (2 ms of the
    link, 256 KiB at most) and the kernel's socket buffers (256 KiB asked for). Latency delays bytes and the end
    of a stream, not the TCP handshake. A target that refuses a connection is a reset to the client.

    Accuracy on a 2-core machine (benchmarks/link_accuracy.py, transfers of 1 s): within 0.2 % from 50 Mbit/s to
    1 Gbit/s; at 5 Gbit/s 1.5 % slow on a quiet machine, 3.5 % on a busy one, for a quarter of a core; 10 Gbit/s is
    about the most it carries. Below 50 Mbit/s the burst shows (+1.2 % at 10 Mbit/s). Moving the bytes with
    splice(2) instead was no cheaper. A thread that computes in pure Python in the same process starves the link
    of the GIL (down to 0.2 Gbit/s): keep the two in different processes. Tensor operations do no such harm.

    Raises ConfigurationError for a target, bandwidth or latency that makes no sense.
    """

    def __init__(
        self, target: str, *, bandwidth_bps: float, latency_s: float = 0.0, burst_bytes: int = 16 * 1024
    ) -> None:
        if not 0 <= latency_s < float("inf"):
            raise ConfigurationError(f"a link's latency cannot be {latency_s} s")
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
        """Bytes taken from clients so far, over all connections."""
        return self._to_target.pacer.reserved_bytes

    @property
    def from_target_bytes(self) -> int:
        """Bytes taken from the target so far, over all connections."""
        return self._from_target.pacer.reserved_bytes

    def set_bandwidth(self, bandwidth_bps: float) -> None:
        """Changes the rate of both directions; pieces already under way keep the old one."""
        self._to_target.pacer.set_rate(bandwidth_bps / 8)
        self._from_target.pacer.set_rate(bandwidth_bps / 8)

    def cut(self) -> None:
        """The link goes dead: nothing passes either way, and no socket learns of it."""
        self._up.clear()

    def restore(self) -> None:
        """The link is back; what was held up goes on."""
        self._up.set()

    def close(self) -> None:
        """Ends every connection and stops; may be called again."""
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
        raise ConfigurationError(f"{target!r} is no host:port")
    try:
        family, _, _, _, address = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)[0]
    except (OSError, OverflowError, UnicodeError) as error:
        raise ConfigurationError(f"the link's target {target!r} cannot be resolved: {error}") from error
    return family, (str(address[0]), int(address[1]))
