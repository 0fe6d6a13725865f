"""Forwards the bytes of one connection through a shaped link."""

import socket
import struct
import threading
import time
from collections import deque

from kvstore_cluster.pacer import Pacer
from kvstore_service.bandwidth import MAX_PIECE_BYTES, piece_bytes

# Size of the forwarder's kernel buffers. The defaults would accept megabytes ahead of a slow link.
SOCKET_BUFFER_BYTES = 256 * 1024
# The forwarder catches up on time that it lost itself (scheduling, the GIL), up to this limit.
MAX_CATCH_UP_S = 0.1
CONNECT_TIMEOUT_S = 10.0
RESET_ON_CLOSE = struct.pack("ii", 1, 0)  # SO_LINGER: on, 0 s


class Direction:
    """State that all connections share in one direction: the rate limit, the latency, and whether the link is up."""

    def __init__(self, rate_bps: float, burst_bytes: int, latency_s: float, up: threading.Event) -> None:
        self.pacer = Pacer(rate_bps / 8, burst_bytes)
        self.latency_s = latency_s
        self.up = up

    def wait_until_up(self) -> bool:
        """Blocks while the link is cut. Returns whether it had to wait."""
        if self.up.is_set():
            return False
        self.up.wait()
        return True

    def deliver(self, sock: socket.socket, data: memoryview) -> bool:
        """Sends all of `data`. Returns True if it waited for the link or the receiver."""
        waited = self.wait_until_up()
        while data:
            try:
                sent = sock.send(data, socket.MSG_DONTWAIT)
            except BlockingIOError:
                waited = True
                sent = sock.send(data)
            data = data[sent:]
        return waited


class _DelayLine:
    """Bytes in transit on a link with latency. Holds at most as many bytes as the link does."""

    def __init__(self, direction: Direction, sock: socket.socket) -> None:
        self._direction = direction
        self._sock = sock
        self._in_flight: deque[tuple[float, bytes]] = deque()
        self._in_flight_bytes = 0
        self._changed = threading.Condition()
        self._ended = False
        self._error: OSError | None = None
        self._thread = threading.Thread(target=self._run, name="link-delay", daemon=True)
        self._thread.start()

    def put(self, data: bytes, departed_at: float) -> bool:
        """Adds bytes that left the near end at `departed_at`. Returns True if it waited for the far end."""
        bytes_per_s = self._direction.pacer.bytes_per_s
        limit_bytes = self._direction.latency_s * bytes_per_s + 2 * piece_bytes(bytes_per_s)
        waited = False
        with self._changed:
            while self._in_flight_bytes > limit_bytes and self._error is None:
                waited = True
                self._changed.wait()
            if self._error is not None:
                raise self._error
            self._in_flight.append((departed_at + self._direction.latency_s, data))
            self._in_flight_bytes += len(data)
            self._changed.notify_all()
        return waited

    def finish(self) -> None:
        """Blocks until all bytes have arrived. Raises the error that stopped the delivery."""
        with self._changed:
            self._ended = True
            self._changed.notify_all()
        self._thread.join()
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._in_flight and not self._ended:
                    self._changed.wait()
                if not self._in_flight:
                    return
                due, data = self._in_flight[0]
            _sleep_until(due)
            try:
                self._direction.deliver(self._sock, memoryview(data))
            except OSError as error:
                with self._changed:
                    self._error = error
                    self._changed.notify_all()
                return
            with self._changed:
                self._in_flight.popleft()
                self._in_flight_bytes -= len(data)
                self._changed.notify_all()


class Connection:
    """A client's connection, and the matching connection to the target."""

    def __init__(self, client: socket.socket, family: int) -> None:
        self._client = client
        self._target = socket.socket(family, socket.SOCK_STREAM)
        self._broken = False
        for sock in (self._client, self._target):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            bound_buffers(sock)

    def run(self, target: tuple[str, int], to_target: Direction, from_target: Direction) -> None:
        """Forwards bytes until both ends have finished, or one has failed."""
        try:
            self._target.settimeout(CONNECT_TIMEOUT_S)
            self._target.connect(target)
            self._target.settimeout(None)
        except OSError:
            self._broken = True
        if not self._broken:
            back = threading.Thread(
                target=self._pump,
                args=(self._target, self._client, from_target),
                name="link-back",
                daemon=True,
            )
            back.start()
            self._pump(self._client, self._target, to_target)
            back.join()
        for sock in (self._client, self._target):
            if self._broken:  # the other end must see a reset, not a clean end
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
            sock.close()

    def end(self) -> None:
        """Wakes all threads that wait on these sockets, so that `run` returns. Called from another thread."""
        self._broken = True
        for sock in (self._client, self._target):
            shutdown(sock, socket.SHUT_RDWR)

    def _break(self) -> None:
        self._broken = True
        for sock in (self._client, self._target):
            shutdown(sock, socket.SHUT_RD)  # wakes the other pump without sending a FIN

    def _pump(self, source: socket.socket, sink: socket.socket, direction: Direction) -> None:
        try:
            self._forward(source, sink, direction)
            if not self._broken:
                sink.shutdown(socket.SHUT_WR)
        except OSError:
            self._break()

    def _forward(self, source: socket.socket, sink: socket.socket, direction: Direction) -> None:
        buffer = memoryview(bytearray(MAX_PIECE_BYTES))
        line = _DelayLine(direction, sink) if direction.latency_s else None
        departed_at = 0.0
        waited = True
        try:
            while True:
                waited |= direction.wait_until_up()
                try:
                    size = source.recv_into(
                        buffer, piece_bytes(direction.pacer.bytes_per_s), socket.MSG_DONTWAIT
                    )
                except BlockingIOError:
                    waited = True
                    size = source.recv_into(buffer, piece_bytes(direction.pacer.bytes_per_s))
                if not size:
                    return
                # This thread, not the sender, delayed bytes that were already waiting. They count as ready since the
                # previous bytes left, so that a late wake-up does not slow the link down.
                now = time.monotonic()
                ready_at = now if waited else max(departed_at, now - MAX_CATCH_UP_S)
                departed_at = direction.pacer.reserve(size, ready_at)
                _sleep_until(departed_at)
                if line is None:
                    waited = direction.deliver(sink, buffer[:size])
                else:
                    waited = line.put(bytes(buffer[:size]), departed_at)
        finally:
            if line is not None:
                line.finish()


def bound_buffers(sock: socket.socket) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SOCKET_BUFFER_BYTES)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SOCKET_BUFFER_BYTES)


def shutdown(sock: socket.socket, how: int) -> None:
    try:
        sock.shutdown(how)
    except OSError:  # the socket is not connected, so no thread waits on it
        return


def _sleep_until(when: float) -> None:
    pause = when - time.monotonic()
    if pause > 0:
        time.sleep(pause)
