"""What a caller may do with the futures it is given: cancel them, and nothing else of the client changes."""

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from queue import SimpleQueue

import pytest
import torch

from kvstore_client import KVStoreClient, connect
from kvstore_client.new_chunk import NewChunk
from tests.client.chunks import SPEC, ids, random_kv
from tests.client.conftest import ServedCluster

WAIT_S = 10


@pytest.fixture
def client(cluster: ServedCluster) -> Iterator[KVStoreClient]:
    with connect(cluster.address) as connected:
        yield connected


class Held:
    """A chunk whose KV is not handed out before `let_go`."""

    def __init__(self) -> None:
        self.asked, self.let_go = threading.Event(), threading.Event()

    def __call__(self) -> tuple[torch.Tensor, torch.Tensor]:
        self.asked.set()
        assert self.let_go.wait(WAIT_S)
        return random_kv(0)


def within(action: Callable[[], object]) -> bool:
    """Whether `action` returns at all."""
    done = threading.Event()
    thread = threading.Thread(target=lambda: (action(), done.set()), daemon=True)
    thread.start()
    return done.wait(WAIT_S)


def test_a_put_that_its_caller_gave_up_is_dropped_and_the_next_is_stored(client: KVStoreClient) -> None:
    first, second, third = ids(3)
    held = Held()
    begun = client.store.put(SPEC, [NewChunk(first, held)])
    assert held.asked.wait(WAIT_S)
    waiting = client.store.put(SPEC, [NewChunk(second, lambda: random_kv(1))])
    assert waiting.cancel()
    assert not begun.cancel()  # it is under way
    held.let_go.set()
    last = client.store.put(SPEC, [NewChunk(third, lambda: random_kv(2))])
    assert last.result(WAIT_S) == 1
    assert begun.result(WAIT_S) == 1
    assert within(client.store.flush)
    assert client.metrics.snapshot()["miss_store_cancelled"] == 1
    assert client.metrics.snapshot()["chunks_stored"] == 2


def test_asyncio_may_give_up_waiting_for_a_put(client: KVStoreClient) -> None:
    held = Held()
    first = client.store.put(SPEC, [NewChunk(ids(1)[0], held)])
    assert held.asked.wait(WAIT_S)

    async def give_up() -> None:
        stored = client.store.put(SPEC, [NewChunk(ids(2)[1], lambda: random_kv(1))])
        await asyncio.wait_for(asyncio.wrap_future(stored), 0.01)

    with pytest.raises(TimeoutError):
        asyncio.run(give_up())
    held.let_go.set()
    assert first.result(WAIT_S) == 1
    assert within(client.store.flush)
    assert client.store.put(SPEC, [NewChunk(ids(2)[1], lambda: random_kv(1))]).result(WAIT_S) == 1


def test_what_a_cancelled_put_held_is_let_go(client: KVStoreClient) -> None:
    """Its bytes count against the backlog no longer."""
    held = Held()
    begun = client.store.put(SPEC, [NewChunk(ids(1)[0], held)])
    assert held.asked.wait(WAIT_S)
    client.store.put(SPEC, [NewChunk(ids(2)[1], lambda: random_kv(1))]).cancel()
    held.let_go.set()
    assert begun.result(WAIT_S) == 1
    assert within(client.store.flush)
    assert client.store._waiting_bytes == 0


def test_a_calibration_is_loaded_for_everybody_whoever_gives_up(cluster: ServedCluster) -> None:
    with connect(cluster.address, encoding="medium-klt-pco") as client:
        loading = client.prepare(SPEC)
        assert not loading.cancel()  # it is everybody's
        assert client.prepare(SPEC).result(WAIT_S) is None  # there is none, and nobody is told otherwise
        assert client.store.put(SPEC, [NewChunk(ids(1)[0], lambda: random_kv(0))]).result(WAIT_S) == 0
        counts = client.metrics.snapshot()
    assert "miss_store_internal_error" not in counts
    assert counts["miss_store_no_calibration"] == 1


def test_a_callback_that_ends_its_thread_stops_no_storing(client: KVStoreClient) -> None:
    held = Held()
    first = client.store.put(SPEC, [NewChunk(ids(1)[0], held)])

    def leave(_stored: object) -> None:
        raise SystemExit

    first.add_done_callback(leave)
    held.let_go.set()
    assert first.result(WAIT_S) == 1
    assert client.store.put(SPEC, [NewChunk(ids(2)[1], lambda: random_kv(1))]).result(WAIT_S) == 1
    assert within(client.store.flush)


class Handover(SimpleQueue[Callable[[], object] | None]):
    """The store's jobs: whoever hands one in is held up until `close` had time to end before it."""

    def __init__(self, close: Callable[[], None]) -> None:
        super().__init__()
        self._close, self._closing = close, False

    def put(self, job: Callable[[], object] | None, block: bool = True, timeout: float | None = None) -> None:
        if threading.current_thread().name == "flushes" and not self._closing:
            self._closing = True
            closing = threading.Thread(target=self._close, daemon=True)
            closing.start()
            closing.join(0.3)  # not for ever: it may have to wait for this thread
        super().put(job, block, timeout)


def test_a_flush_that_meets_a_close_returns(client: KVStoreClient) -> None:
    client.store._jobs = Handover(client.store.close)
    assert client.store.put(SPEC, [NewChunk(ids(1)[0], lambda: random_kv(0))]).result(WAIT_S) == 1
    flushing = threading.Thread(target=client.store.flush, name="flushes", daemon=True)
    flushing.start()
    flushing.join(WAIT_S)
    assert not flushing.is_alive()


def test_a_flush_waits_for_what_a_close_still_stores(client: KVStoreClient) -> None:
    held = Held()
    stored = client.store.put(SPEC, [NewChunk(ids(1)[0], held)])
    assert held.asked.wait(WAIT_S)
    closing = threading.Thread(target=client.store.close)
    closing.start()
    while not client.store._closed:
        time.sleep(0.001)
    flushed = threading.Event()
    flushing = threading.Thread(target=lambda: (client.store.flush(), flushed.set()))
    flushing.start()
    assert not flushed.wait(0.05)
    held.let_go.set()
    for thread in (closing, flushing):
        thread.join(WAIT_S)
    assert flushed.is_set()
    assert stored.result(0) == 1


def test_a_process_without_a_thread_left_drops_chunks_and_stores_later(
    client: KVStoreClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = threading.Thread.start

    def no_thread(thread: threading.Thread) -> None:
        if thread.name == "kvstore-store":
            raise RuntimeError("can't start new thread")
        start(thread)

    chunk = NewChunk(ids(1)[0], lambda: random_kv(0))
    with monkeypatch.context() as full:
        full.setattr(threading.Thread, "start", no_thread)
        assert client.store.put(SPEC, [chunk]).result(WAIT_S) == 0
        assert within(client.store.flush)
    assert client.metrics.snapshot()["miss_store_no_resources"] == 1
    assert client.store.put(SPEC, [chunk]).result(WAIT_S) == 1
