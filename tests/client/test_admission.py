"""Requests that wait for KV, and those that do not."""

import random
import threading
import time
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore_client.admission import AdmissionQueue
from kvstore_client.metrics import ClientMetrics

SOON_S = 60.0
PROMPT_S = 30.0


class Load:
    """KV that is there when the test says so."""

    def __init__(
        self, size_bytes: int = 1, *, fails: bool = False, begins: threading.Event | None = None
    ) -> None:
        self.size_bytes = size_bytes
        self.started = threading.Event()
        self.cancelled = threading.Event()
        self.left_s = 1e9
        self._fails, self._begins = fails, begins
        self._lock = threading.Lock()
        self._arrived = False
        self._callbacks: list[Callable[[], object]] = []

    def start(self) -> None:
        self.started.set()
        if self._begins is not None:
            assert self._begins.wait(SOON_S)
        if self._fails:
            raise MemoryError("no room for buffers")

    def on_ready(self, callback: Callable[[], object]) -> None:
        with self._lock:
            if not self._arrived:
                self._callbacks.append(callback)
                return
        callback()

    def remaining_s(self) -> float:
        return self.left_s

    def cancel(self) -> None:
        self.cancelled.set()
        self.arrive()

    def arrive(self) -> None:
        with self._lock:
            self._arrived = True
            callbacks, self._callbacks = self._callbacks, []
        for callback in callbacks:
            callback()


class Request:
    def __init__(self, name: str) -> None:
        self.name = name

    def __repr__(self) -> str:
        return self.name


class Deaf(Load):
    """KV of which nobody can hear that it is there."""

    def on_ready(self, callback: Callable[[], object]) -> None:
        raise TypeError("a mistake")


Queue = AdmissionQueue[Request]
A, B, C, D = map(Request, "abcd")


@pytest.fixture
def queue() -> Iterator[Queue]:
    queue = Queue(ClientMetrics(), fetches=2, buffer_bytes=10)
    yield queue
    queue.close()
    assert not [t for t in threading.enumerate() if t.name == "kvstore-admission"]


def test_requests_that_need_no_kv_come_in_order(queue: Queue) -> None:
    for request in (A, B, C):
        queue.submit(request)
    assert [queue.next_ready(0) for _ in range(4)] == [A, B, C, None]


def test_who_waits_for_kv_is_passed_and_then_comes_in_order_of_arrival(queue: Queue) -> None:
    slow = Load()
    queue.submit(A, slow)
    queue.submit(B)
    queue.submit(C)
    assert queue.next_ready(SOON_S) is B
    assert slow.started.wait(SOON_S)
    assert queue.waiting == 1
    slow.arrive()
    assert queue.next_ready(SOON_S) is A  # it came before C
    assert queue.next_ready(SOON_S) is C
    assert queue.waiting == 0


def test_an_engine_that_waits_is_woken(queue: Queue) -> None:
    slow = Load()
    queue.submit(A, slow)
    started = time.monotonic()
    threading.Timer(0.1, slow.arrive).start()
    assert queue.next_ready(SOON_S) is A
    assert 0.09 < time.monotonic() - started < PROMPT_S
    assert queue.next_ready(0.05) is None


def test_no_more_fetch_than_may_and_those_without_kv_pass(queue: Queue) -> None:
    loads = [Load() for _ in range(3)]
    for request, load in zip((A, B, C), loads, strict=True):
        queue.submit(request, load)
    queue.submit(D)
    assert queue.next_ready(SOON_S) is D
    assert loads[1].started.wait(SOON_S)
    assert not loads[2].started.wait(0.05)
    loads[1].arrive()
    assert loads[2].started.wait(SOON_S)  # B is not even taken: it fetches no more
    assert queue.next_ready(SOON_S) is B


def test_buffers_are_bounded_until_their_request_is_finished(queue: Queue) -> None:
    first, second = Load(6), Load(6)
    queue.submit(A, first)
    queue.submit(B, second)
    assert first.started.wait(SOON_S)
    first.arrive()
    assert queue.next_ready(SOON_S) is A
    assert not second.started.wait(0.05)
    queue.finished(A)
    assert second.started.wait(SOON_S)


def test_one_request_may_be_larger_than_the_limit_when_it_is_alone(queue: Queue) -> None:
    small, large, after = Load(1), Load(99), Load(1)
    for request, load in ((A, small), (B, large), (C, after)):
        queue.submit(request, load)
    assert small.started.wait(SOON_S)
    small.arrive()
    assert queue.next_ready(SOON_S) is A
    assert not large.started.wait(0.05)
    queue.finished(A)
    assert large.started.wait(SOON_S)
    assert not after.started.wait(0.05)  # it must not be overtaken for ever
    large.arrive()
    assert queue.next_ready(SOON_S) is B
    queue.finished(B)
    assert after.started.wait(SOON_S)


def test_a_fetch_that_cannot_start_makes_its_request_ready(
    queue: Queue, caplog: pytest.LogCaptureFixture
) -> None:
    queue.submit(A, Load(fails=True))
    assert queue.next_ready(SOON_S) is A
    assert "no room for buffers" in caplog.text
    loads = [Load(), Load()]  # and holds no place
    for request, load in zip((B, C), loads, strict=True):
        queue.submit(request, load)
    assert all(load.started.wait(SOON_S) for load in loads)


def test_a_fetch_that_never_began_is_not_cancelled(queue: Queue) -> None:
    load = Load(fails=True)
    queue.submit(A, load)
    assert load.started.wait(SOON_S)
    while queue.waiting:
        time.sleep(0.001)
    assert queue.cancel(A)
    assert not load.cancelled.is_set()


def test_cancelled_requests_never_come_and_make_room(queue: Queue) -> None:
    loads = [Load(), Load(), Load()]
    for request, load in zip((A, B, C), loads, strict=True):
        queue.submit(request, load)
    assert loads[1].started.wait(SOON_S)
    while queue.waiting != 3 or queue._fetching != 2:
        time.sleep(0.001)
    assert queue.cancel(C)  # not started
    assert queue.cancel(A)  # fetching
    assert loads[0].cancelled.is_set()
    assert not loads[2].started.is_set()
    queue.submit(D, loads[2])
    assert loads[2].started.wait(SOON_S)
    loads[1].arrive()
    assert queue.cancel(B)  # ready
    assert loads[1].cancelled.is_set()
    loads[2].arrive()
    assert queue.next_ready(SOON_S) is D
    assert not queue.cancel(D)  # taken
    assert not queue.cancel(A)
    assert queue.next_ready(0) is None
    assert queue.waiting == 0


def test_a_request_cancelled_while_it_starts_is_ended_when_it_has(queue: Queue) -> None:
    begins = threading.Event()
    load, others = Load(9, begins=begins), [Load(), Load()]
    queue.submit(A, load)
    assert load.started.wait(SOON_S)
    assert queue.cancel(A)
    assert not load.cancelled.is_set()
    begins.set()
    assert load.cancelled.wait(SOON_S)
    queue.submit(A, others[0])  # it may come again
    queue.submit(B, others[1])
    assert all(other.started.wait(SOON_S) for other in others)


def test_closing_cancels_what_was_not_taken() -> None:
    metrics = ClientMetrics()
    queue = Queue(metrics, fetches=1, buffer_bytes=10)
    loads = [Load(), Load()]
    queue.submit(D)
    assert queue.next_ready(0) is D
    queue.submit(A, loads[0])
    queue.submit(B, loads[1])
    queue.submit(C)
    assert loads[0].started.wait(SOON_S)
    assert metrics.snapshot()["waiting_for_kv"] == 2
    waiter = threading.Timer(0.05, lambda: queue.close())
    assert set(queue.close()) == {A, B, C}
    waiter.start()
    assert queue.next_ready(SOON_S) is None
    waiter.join()
    assert loads[0].cancelled.is_set()
    assert not loads[1].started.is_set()
    assert metrics.snapshot()["waiting_for_kv"] == 0
    queue.finished(D)
    with pytest.raises(ValueError, match="closed"):
        queue.submit(A)


def test_the_same_request_twice_is_refused(queue: Queue) -> None:
    queue.submit(A)
    with pytest.raises(ValueError, match="already"):
        queue.submit(A)


def test_an_idle_engine_takes_a_request_that_is_nearly_there() -> None:
    queue = Queue(ClientMetrics(), fetches=4, buffer_bytes=100, early_s=0.2)
    loads = [Load(), Load()]
    for request, load in zip((A, B), loads, strict=True):
        queue.submit(request, load)
    assert loads[1].started.wait(SOON_S)
    assert queue.next_ready(0.02) is None
    queue.submit(C)
    assert queue.next_ready(0) is C
    loads[1].left_s = 0.1
    started = time.monotonic()
    assert queue.next_ready(SOON_S) is B
    assert time.monotonic() - started < PROMPT_S
    queue.finished(B)
    loads[1].arrive()  # later than the engine was done
    loads[0].arrive()
    assert queue.next_ready(SOON_S) is A
    assert queue.waiting == 0
    assert queue.close() == []


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 1 << 32), st.integers(1, 4), st.integers(1, 30))
def test_every_request_comes_once_within_bounds(seed: int, fetches: int, buffer_bytes: int) -> None:
    """Engines, submitters, arrivals and cancels from several threads."""
    chance = random.Random(seed)
    queue = Queue(ClientMetrics(), fetches=fetches, buffer_bytes=buffer_bytes)
    lock = threading.Lock()
    live: dict[Load, int] = {}
    alone_at_most = True

    class Counted(Load):
        def start(self) -> None:
            nonlocal alone_at_most
            with lock:
                live[self] = self.size_bytes
                total = sum(live.values())
                alone_at_most &= total <= buffer_bytes or len(live) == 1
            threading.Timer(delays[self], self.arrive).start()

        def cancel(self) -> None:
            with lock:
                live.pop(self)
            super().cancel()

    loads = [Counted(chance.randint(1, 12)) if chance.random() < 0.7 else None for _ in range(30)]
    delays = {load: chance.random() * 0.01 for load in loads if load is not None}
    requests = [Request(str(i)) for i in range(len(loads))]
    kv = dict(zip(requests, loads, strict=True))
    doomed = [request for request in requests if chance.random() < 0.2]
    taken: list[Request] = []
    cancelled: list[Request] = []

    def engine() -> None:
        while len(taken) + len(cancelled) < len(requests):
            request = queue.next_ready(0.02)
            if request is not None:
                with lock:
                    if (load := kv[request]) is not None:
                        live.pop(load)
                    taken.append(request)
                queue.finished(request)

    threads = [threading.Thread(target=engine) for _ in range(2)]
    for thread in threads:
        thread.start()
    for request in requests:
        queue.submit(request, kv[request])
    cancelled += filter(queue.cancel, doomed)
    for thread in threads:
        thread.join(SOON_S)
        assert not thread.is_alive()
    assert sorted(map(str, taken + cancelled)) == sorted(map(str, requests))
    assert alone_at_most
    assert (queue.waiting, queue._fetching, queue._held_bytes) == (0, 0, 0)
    assert queue.close() == []


def test_a_fetch_that_cannot_be_followed_keeps_nobody_waiting(queue: Queue) -> None:
    later = Load()
    queue.submit(A, Deaf())
    queue.submit(B, later)
    assert queue.next_ready(SOON_S) is A
    later.arrive()
    assert queue.next_ready(SOON_S) is B
    queue.finished(A)
    queue.finished(B)
