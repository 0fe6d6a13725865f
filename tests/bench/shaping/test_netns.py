"""Namespaces and the kernel's shaping, where this machine lets us make them."""

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest

from kvstore_bench.shaping import netns
from kvstore_bench.shaping.netns import NetworkNamespace
from kvstore_codec.errors import ConfigurationError

REASON = netns.unavailable()
needs_namespaces = pytest.mark.skipif(REASON is not None, reason=REASON or "")
MBIT = 1e6

RECEIVE = """
import socket, sys, time
with socket.create_connection((sys.argv[1], int(sys.argv[2])), 10) as connected:
    began, missing, buffer = time.monotonic(), int(sys.argv[3]), bytearray(1 << 16)
    while missing:
        missing -= connected.recv_into(buffer, min(missing, len(buffer)))
    print(time.monotonic() - began)
"""


def namespaces() -> str:
    return subprocess.run(("ip", "netns", "list"), check=True, capture_output=True, text=True).stdout  # noqa: S607


@pytest.fixture
def link() -> Iterator[NetworkNamespace]:
    with NetworkNamespace(50 * MBIT) as link:
        yield link


def receive_inside(link: NetworkNamespace, size_bytes: int) -> float:
    """Seconds that so many bytes took into the namespace."""

    def send() -> None:
        connected, _ = listener.accept()
        with connected:
            connected.sendall(bytes(size_bytes))

    with socket.create_server((link.host_address, 0)) as listener:
        sender = threading.Thread(target=send)
        sender.start()
        port = str(listener.getsockname()[1])
        done = subprocess.run(
            [*link.command, sys.executable, "-c", RECEIVE, link.host_address, port, str(size_bytes)],
            check=True,
            capture_output=True,
            text=True,
            timeout=30,
        )
        sender.join()
    return float(done.stdout)


@needs_namespaces
def test_bytes_pass_at_the_rate_and_at_a_new_one(link: NetworkNamespace) -> None:
    size_bytes = 1 << 20
    at_50_mbit_s = receive_inside(link, size_bytes)
    assert at_50_mbit_s > 0.9 * (size_bytes - (16 << 10)) * 8 / (50 * MBIT)
    link.set_bandwidth(1000 * MBIT)
    assert receive_inside(link, size_bytes) < at_50_mbit_s / 2


SERVE = """
import socket, sys
with socket.create_server((sys.argv[1], 0)) as listener:
    print(listener.getsockname()[1], flush=True)
    while True:
        connected, _ = listener.accept()
        connected.sendall(bytes(100_000))
        connected.close()
"""


def receive_from_inside(address: str, port: int, timeout_s: float) -> int:
    """Bytes that a server inside sends."""
    with socket.create_connection((address, port), timeout_s) as connected:
        return sum(iter(lambda: len(connected.recv(1 << 16)), 0))


@needs_namespaces
def test_a_cut_link_carries_nothing_until_it_is_mended() -> None:
    with NetworkNamespace(None) as link:
        command = (*link.command, sys.executable, "-c", SERVE, link.inside_address)
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
            assert server.stdout is not None
            port = int(server.stdout.readline())
            before = link.bytes_from_inside
            assert receive_from_inside(link.inside_address, port, 10) == 100_000
            assert 100_000 < link.bytes_from_inside - before < 120_000
            link.cut()
            with pytest.raises(OSError, match=r"timed out|unreachable|No route"):
                receive_from_inside(link.inside_address, port, 0.5)
            link.mend()
            assert receive_from_inside(link.inside_address, port, 10) == 100_000
            server.kill()


@needs_namespaces
def test_the_shaping_ends_where_a_link_is_to_be_unshaped(link: NetworkNamespace) -> None:
    def shaped() -> bool:
        queues = subprocess.run(
            (*link.command, "tc", "qdisc", "show"), check=True, capture_output=True, text=True
        )
        return "tbf" in queues.stdout

    assert shaped()
    link.set_bandwidth(None)
    assert not shaped()
    link.set_bandwidth(MBIT)
    assert shaped()


@needs_namespaces
def test_there_is_no_other_way_out(link: NetworkNamespace) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = str(listener.getsockname()[1])
        tried = subprocess.run(
            [*link.command, sys.executable, "-c", RECEIVE, "127.0.0.1", port, "1"], capture_output=True, timeout=30
        )  # fmt: skip
    assert b"refused" in tried.stderr


@needs_namespaces
def test_nothing_is_left_when_the_run_was_interrupted() -> None:
    with pytest.raises(KeyboardInterrupt), NetworkNamespace(50 * MBIT) as link:  # noqa: PT012
        assert link.name in namespaces()
        raise KeyboardInterrupt
    assert link.name not in namespaces()


@needs_namespaces
def test_two_at_once() -> None:
    with NetworkNamespace(50 * MBIT) as first, NetworkNamespace(50 * MBIT) as second:
        assert first.host_address != second.host_address


@needs_namespaces
def test_what_a_killed_run_left_is_removed() -> None:
    script = (
        "import os\nfrom kvstore_bench.shaping.netns import NetworkNamespace\n"
        "link = NetworkNamespace(5e7).__enter__()\nprint(link.name, flush=True)\nos.kill(os.getpid(), 9)"
    )
    killed = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    name = killed.stdout.strip()
    assert name in namespaces()
    assert name in netns.remove_leftovers()
    assert name not in namespaces()


@needs_namespaces
def test_a_bandwidth_that_makes_no_sense(link: NetworkNamespace) -> None:
    with pytest.raises(ConfigurationError, match="above 0"):
        link.set_bandwidth(0)


@pytest.mark.skipif(os.geteuid() != 0, reason="gives up being root")
def test_says_why_it_cannot() -> None:
    script = (
        "import os\nfrom kvstore_bench.shaping import netns\nos.environ['PATH'] = '/nowhere'\n"
        "print(netns.unavailable())\nos.environ['PATH'] = '/usr/sbin:/usr/bin:/sbin:/bin'\n"
        "os.setuid(65534)\nprint(netns.unavailable())"
    )
    said = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True
    )
    without_tools, without_root = said.stdout.splitlines()
    assert "install iproute2" in without_tools
    assert "not root" in without_root or "iproute2" in without_root
