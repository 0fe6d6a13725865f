"""The link against real sockets. Lower bounds on time are exact (a link is never faster than its rate); upper
bounds are wide, for busy machines. benchmarks/link_accuracy.py measures how close it comes."""

import contextlib
import hashlib
import os
import select
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from kvstore_bench.shaping import ShapedLink
from kvstore_codec.errors import ConfigurationError
from kvstore_service.bandwidth import parse_bandwidth

MBIT = 1e6
BURST_BYTES = 16 * 1024
BLOB = os.urandom(1 << 20)


@contextlib.contextmanager
def serving(handle: Callable[[socket.socket], None]) -> Iterator[str]:
    """A real TCP server that runs `handle` in a thread for each connection; gives its address."""
    connections: list[socket.socket] = []
    threads: list[threading.Thread] = []

    def serve(connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):  # tests break connections on purpose
            handle(connection)

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = listener.accept()
                connections.append(connection)
                threads.append(threading.Thread(target=serve, args=(connection,)))
                threads[-1].start()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        acceptor = threading.Thread(target=accept)
        acceptor.start()
        try:
            yield "{}:{}".format(*listener.getsockname())
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            acceptor.join()
            for connection in connections:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)
            for thread in threads:
                thread.join()


def connect(address: str, timeout_s: float = 30.0) -> socket.socket:
    host, port = address.split(":")
    return socket.create_connection((host, int(port)), timeout_s)


def read_exactly(sock: socket.socket, size: int) -> bytes:
    data = bytearray(size)
    view = memoryview(data)
    while view:
        got = sock.recv_into(view)
        if not got:
            raise EOFError(f"{len(view)} of {size} bytes missing")
        view = view[got:]
    return bytes(data)


def read_all(sock: socket.socket) -> bytes:
    return b"".join(iter(lambda: sock.recv(1 << 16), b""))


def send_blob(sock: socket.socket) -> None:
    """Sends as many bytes of the (repeated) BLOB as each 8-byte request asks for."""
    while request := sock.recv(8, socket.MSG_WAITALL):
        (missing,) = struct.unpack("<Q", request)
        while missing > 0:
            missing -= sock.send(BLOB[: min(missing, len(BLOB))])


def reply_digest(sock: socket.socket) -> None:
    """Reads until the sender's end of stream, then answers with what arrived."""
    sock.sendall(hashlib.sha256(read_all(sock)).digest())


def ask(sock: socket.socket, size: int) -> None:
    sock.sendall(struct.pack("<Q", size))


def exchange_blobs(sock: socket.socket) -> None:
    """Sends the BLOB while reading one, to the end of both streams."""

    def send() -> None:
        sock.sendall(BLOB)
        sock.shutdown(socket.SHUT_WR)

    sender = threading.Thread(target=send)
    sender.start()
    assert read_all(sock) == BLOB
    sender.join()


def hold(sock: socket.socket) -> None:
    """Never reads: the receive window closes."""
    poll = select.poll()
    poll.register(sock, select.POLLRDHUP)
    poll.poll()


def read_until_silent(sock: socket.socket) -> bytes:
    data = bytearray()
    with contextlib.suppress(TimeoutError):
        while piece := sock.recv(1 << 16):
            data += piece
    return bytes(data)


def send_until_stopped(sock: socket.socket) -> int:
    """Bytes that were taken before a send had to wait for the socket's time-out."""
    sent = 0
    with contextlib.suppress(TimeoutError):
        while True:
            sent += sock.send(BLOB)
    return sent


@pytest.mark.parametrize(
    ("text", "bandwidth_bps"),
    [("1gbit", 1e9), ("50mbit", 50e6), ("2.5Gbit", 2.5e9), (" 500 kbit ", 5e5), ("9600bit", 9600.0)],
)
def test_bandwidths_read_as_people_write_them(text: str, bandwidth_bps: float) -> None:
    assert parse_bandwidth(text) == bandwidth_bps


@pytest.mark.parametrize(
    "text",
    [
        "",
        "fast",
        "1",
        "1g",
        "1gb",
        "1gbps",
        "-1gbit",
        "0mbit",
        "nan gbit",
        "1e3bit",
        "1gbit/s x",
        "infbit",
        "9" * 400 + "bit",
    ],
)
def test_what_is_no_bandwidth_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(ConfigurationError, match="1gbit"):
        parse_bandwidth(text)


@pytest.mark.parametrize(
    "target",
    ["", "localhost", "127.0.0.1:", ":80", "127.0.0.1:http", "no.such.host.invalid:80", "a" * 70 + ":80"],
)
def test_a_target_that_makes_no_sense_is_refused(target: str) -> None:
    with pytest.raises(ConfigurationError):
        ShapedLink(target, bandwidth_bps=MBIT)


@pytest.mark.parametrize("bandwidth_bps", [0.0, -1.0, float("inf"), float("nan")])
def test_an_impossible_bandwidth_is_refused(bandwidth_bps: float) -> None:
    with pytest.raises(ConfigurationError, match="bandwidth"):
        ShapedLink("127.0.0.1:1", bandwidth_bps=bandwidth_bps)
    with pytest.raises(ConfigurationError, match="latency"):
        ShapedLink("127.0.0.1:1", bandwidth_bps=MBIT, latency_s=bandwidth_bps - 1)


@pytest.mark.parametrize(("bandwidth_bps", "size"), [(50 * MBIT, 1_500_000), (1000 * MBIT, 30_000_000)])
def test_bytes_take_the_time_the_bandwidth_gives_them(bandwidth_bps: float, size: int) -> None:
    for _ in range(10):  # a link that is too slow always is, a busy machine sometimes
        with (
            serving(send_blob) as target,
            ShapedLink(target, bandwidth_bps=bandwidth_bps) as link,
            connect(link.address) as sock,
        ):
            started = time.monotonic()
            ask(sock, size)
            data = read_exactly(sock, size)
            elapsed_s = time.monotonic() - started
            assert data == (BLOB * (size // len(BLOB) + 1))[:size]
            assert (size - BURST_BYTES) * 8 / bandwidth_bps <= elapsed_s
            assert link.from_target_bytes == size
            assert link.to_target_bytes == 8
        if elapsed_s < 2 * size * 8 / bandwidth_bps + 1:
            return
    pytest.fail(f"{size} bytes took {elapsed_s:.2f} s")


def test_connections_share_the_link() -> None:
    size = 500_000
    with (
        serving(send_blob) as target,
        ShapedLink(target, bandwidth_bps=40 * MBIT) as link,
        connect(link.address) as one,
        connect(link.address) as other,
    ):
        started = time.monotonic()
        ask(one, size)
        ask(other, size)
        read_exactly(one, size)
        read_exactly(other, size)
        assert time.monotonic() - started >= (2 * size - BURST_BYTES) * 8 / (40 * MBIT)
        assert link.from_target_bytes == 2 * size


def test_directions_do_not_share_it() -> None:
    received = threading.Semaphore(0)

    def exchange(sock: socket.socket) -> None:
        exchange_blobs(sock)
        received.release()

    one_way_s = len(BLOB) * 8 / (20 * MBIT)
    with serving(exchange) as target:
        for _ in range(5):  # a shared rate always takes twice the time, a busy machine sometimes
            with (
                ShapedLink(target, bandwidth_bps=20 * MBIT) as link,
                connect(link.address) as sock,
            ):
                started = time.monotonic()
                exchange_blobs(sock)
                elapsed_s = time.monotonic() - started
                assert received.acquire(timeout=30), "the target never got the whole blob"
                assert link.to_target_bytes == link.from_target_bytes == len(BLOB)
            if elapsed_s < 1.8 * one_way_s:
                return
    pytest.fail(f"both directions took {elapsed_s:.2f} s, one takes {one_way_s:.2f} s")


def test_end_of_stream_passes_in_one_direction_alone() -> None:
    for latency_s in (0.0, 0.02):
        with (
            serving(reply_digest) as target,
            ShapedLink(target, bandwidth_bps=1000 * MBIT, latency_s=latency_s) as link,
            connect(link.address) as sock,
        ):
            sock.sendall(BLOB)
            sock.shutdown(socket.SHUT_WR)
            assert read_all(sock) == hashlib.sha256(BLOB).digest()


def test_a_reset_is_not_passed_on_as_an_end_of_stream() -> None:
    def reset(sock: socket.socket) -> None:
        sock.sendall(b"half an answer")
        sock.recv(1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    with (
        serving(reset) as target,
        ShapedLink(target, bandwidth_bps=MBIT) as link,
        connect(link.address) as sock,
    ):
        assert read_exactly(sock, 14) == b"half an answer"
        sock.sendall(b"!")
        with pytest.raises(ConnectionResetError):
            sock.recv(1)


def test_a_target_that_is_down_resets_the_client_and_may_come_back() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with ShapedLink(f"127.0.0.1:{port}", bandwidth_bps=MBIT) as link:
        # The link may reset the connection before `connect` returns.
        with pytest.raises(ConnectionResetError), connect(link.address) as sock:
            sock.recv(1)
        with socket.create_server(("127.0.0.1", port)) as listener, connect(link.address) as sock:
            server, _ = listener.accept()
            with server:
                server.sendall(b"back")
                assert read_exactly(sock, 4) == b"back"


def test_bandwidth_changes_in_mid_transfer() -> None:
    size = 2_500_000  # 40 s at the first rate
    with (
        serving(send_blob) as target,
        ShapedLink(target, bandwidth_bps=0.5 * MBIT) as link,
        connect(link.address) as sock,
    ):
        started = time.monotonic()
        ask(sock, size)
        read_exactly(sock, 30_000)
        link.set_bandwidth(1000 * MBIT)
        read_exactly(sock, size - 30_000)
        assert (30_000 - BURST_BYTES) * 8 / (0.5 * MBIT) <= time.monotonic() - started < 20
        started = time.monotonic()
        link.set_bandwidth(10 * MBIT)
        ask(sock, 300_000)
        read_exactly(sock, 300_000)
        assert time.monotonic() - started >= (300_000 - BURST_BYTES) * 8 / (10 * MBIT)


@pytest.mark.parametrize("latency_s", [0.0, 0.02])
def test_a_cut_link_is_silent_until_it_is_restored(latency_s: float) -> None:
    size = 1_000_000
    with (
        serving(send_blob) as target,
        ShapedLink(target, bandwidth_bps=20 * MBIT, latency_s=latency_s) as link,
        connect(link.address, timeout_s=0.3) as sock,
    ):
        ask(sock, size)
        data = bytearray(read_exactly(sock, 100_000))
        link.cut()
        data += read_until_silent(sock)  # what was delivered before the cut
        assert len(data) < size
        with connect(link.address, timeout_s=0.1) as newcomer:
            ask(newcomer, 1)
            with pytest.raises(TimeoutError):
                newcomer.recv(1)
            link.restore()
            sock.settimeout(30)
            data += read_exactly(sock, size - len(data))
            newcomer.settimeout(30)
            assert read_exactly(newcomer, 1) == BLOB[:1]
        assert data == BLOB[:size]


def test_latency_delays_every_answer_but_not_the_stream() -> None:
    with (
        serving(send_blob) as target,
        ShapedLink(target, bandwidth_bps=100 * MBIT, latency_s=0.1) as link,
        connect(link.address) as sock,
    ):
        took_s = []
        for _ in range(5):
            started = time.monotonic()
            ask(sock, 100)
            read_exactly(sock, 100)
            took_s.append(time.monotonic() - started)
        assert 0.2 <= min(took_s) < 0.4
        started = time.monotonic()
        ask(sock, 5_000_000)
        data = read_exactly(sock, 5_000_000)
        # The link passes pieces of 2 ms. A delay of each would add 20 s.
        assert 0.4 <= time.monotonic() - started < 10
        assert data == (BLOB * 5)[:5_000_000]


@pytest.mark.parametrize("latency_s", [0.0, 0.01])
def test_a_receiver_that_does_not_read_stops_the_sender(latency_s: float) -> None:
    with (
        serving(hold) as target,
        ShapedLink(target, bandwidth_bps=8000 * MBIT, latency_s=latency_s) as link,
        connect(link.address, timeout_s=0.5) as sock,
    ):
        sent = send_until_stopped(sock)
        # The link itself (10 MB at most here), the target's own receive buffer, and pieces on the way.
        assert link.to_target_bytes <= sent < 8e9 / 8 * latency_s + 8_000_000


def test_a_slow_link_does_not_swallow_megabytes_ahead_of_its_rate() -> None:
    with (
        serving(hold) as target,
        ShapedLink(target, bandwidth_bps=MBIT) as link,
        connect(link.address) as sock,
    ):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 64 * 1024)
        sock.settimeout(0.3)
        assert send_until_stopped(sock) < 1_000_000


@pytest.mark.parametrize("cut_first", [False, True])
@pytest.mark.parametrize("latency_s", [0.0, 0.05])
def test_closing_ends_everything(cut_first: bool, latency_s: float) -> None:
    before = set(threading.enumerate())
    with serving(send_blob) as target:
        link = ShapedLink(target, bandwidth_bps=10 * MBIT, latency_s=latency_s)
        with connect(link.address) as busy, connect(link.address) as idle:
            ask(busy, 10_000_000)
            read_exactly(busy, 10_000)
            if cut_first:
                link.cut()
            link.close()
            link.close()
            for sock in (busy, idle):
                with contextlib.suppress(ConnectionResetError):
                    read_all(sock)
        assert link.from_target_bytes < 10_000_000
        with pytest.raises(ConnectionRefusedError):
            connect(link.address)
    assert set(threading.enumerate()) <= before
