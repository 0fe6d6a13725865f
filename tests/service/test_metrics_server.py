"""The metrics port against clients that are many, slow or verbose."""

import contextlib
import socket
import socketserver
import struct
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator

import pytest
from prometheus_client import Gauge
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from kvstore_service import metrics_server
from kvstore_service.listen import Address
from kvstore_service.metrics_server import MAX_CONNECTIONS, MAX_SCRAPES, metrics_endpoint
from tests.service.bulk_port import wait_until

HOST = "127.0.0.1"


def scrape(port: int, path: str = "/metrics") -> int:
    try:
        with urllib.request.urlopen(f"http://{HOST}:{port}{path}", timeout=30) as response:
            assert b"kvstore_any 3.0" in response.read()
            return int(response.status)
    except urllib.error.HTTPError as error:
        with error:
            return error.code


@pytest.fixture
def metrics(unused_port: int) -> Iterator[int]:
    with metrics_endpoint(Address(HOST, unused_port)) as registry:
        Gauge("kvstore_any", "any", registry=registry).set(3)
        yield unused_port


def serving() -> int:
    """Number of threads that serve connections."""
    return sum("process_request_thread" in thread.name for thread in threading.enumerate())


def test_many_slow_connections_are_few_and_keep_nobody_out(metrics: int) -> None:
    with contextlib.ExitStack() as connections:
        for _ in range(5 * MAX_CONNECTIONS):
            slow = connections.enter_context(socket.create_connection((HOST, metrics), 5))
            slow.sendall(b"GET /metrics HTTP/1.1\r\n")
        assert scrape(metrics) == 200
        assert serving() <= 2 * MAX_CONNECTIONS
    wait_until(lambda: serving() == 0)


def test_a_request_that_drips_is_not_waited_for(metrics: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each byte comes in time, the whole request does not."""
    monkeypatch.setattr(metrics_server, "PATIENCE_S", 0.3)
    with socket.create_connection((HOST, metrics), 5) as slow:

        def drip() -> None:
            deadline_s = time.monotonic() + 30
            while time.monotonic() < deadline_s:
                slow.sendall(b"G")
                time.sleep(0.02)

        with pytest.raises(ConnectionError):
            drip()


def test_a_request_has_a_limit(metrics: int) -> None:
    with socket.create_connection((HOST, metrics), 5) as verbose:
        verbose.settimeout(30)
        with contextlib.suppress(ConnectionError):
            verbose.sendall(b"GET /metrics HTTP/1.1\r\n" + b"X: " + b"y" * (1 << 20) + b"\r\n\r\n")
        with contextlib.suppress(ConnectionError):
            assert verbose.recv(1) == b""
    assert scrape(metrics) == 200


def test_half_a_request_is_not_served_and_writes_nothing(
    metrics: int, capfd: pytest.CaptureFixture[str]
) -> None:
    """A flood of them filled the service's log."""
    for sent in (b"GET /metrics HTTP/1.1\r\n", b"GET /metrics HTTP/1.1\r\n\r\n"):
        with socket.create_connection((HOST, metrics), 5) as hasty:
            hasty.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            hasty.sendall(sent)
    wait_until(lambda: serving() == 0)
    assert scrape(metrics) == 200
    assert capfd.readouterr().err == ""


def test_only_few_requests_are_answered_at_once(unused_port: int) -> None:
    """Each asks the whole cluster."""
    asked, answer = threading.Semaphore(0), threading.Event()

    class Slow(Collector):
        def describe(self) -> list[GaugeMetricFamily]:
            return []

        def collect(self) -> Iterator[GaugeMetricFamily]:
            asked.release()
            answer.wait(30)
            yield GaugeMetricFamily("kvstore_any", "any", value=3)

    codes: list[int] = []
    with metrics_endpoint(Address(HOST, unused_port)) as registry:
        registry.register(Slow())
        scrapes = [
            threading.Thread(target=lambda: codes.append(scrape(unused_port))) for _ in range(MAX_SCRAPES)
        ]
        for one in scrapes:
            one.start()
        for _ in scrapes:
            assert asked.acquire(timeout=30)
        assert scrape(unused_port) == 503
        answer.set()
        for one in scrapes:
            one.join()
        assert codes == [200] * MAX_SCRAPES


def test_without_threads_for_a_while_it_answers_again(metrics: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_thread(*_: object, **__: object) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as limited:
        limited.setattr(socketserver.ThreadingMixIn, "process_request", no_thread)
        for _ in range(3 * MAX_CONNECTIONS):
            with (
                socket.create_connection((HOST, metrics), 5) as refused,
                contextlib.suppress(ConnectionError),
            ):
                assert refused.recv(1) == b""
    assert scrape(metrics) == 200
