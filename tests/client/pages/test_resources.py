"""A process that has no thread left, and a store that closes while its threads are busy."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from kvstore_client.pages.event import Event
from kvstore_client.pages.get import GetPages
from tests.client.pages.conftest import Pages, empty, keys, pages

SIZES = [200_000] * 24


class NoThread:
    """While `name` is set, no thread whose name begins with it starts."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.name: str | None = None
        start = threading.Thread.start

        def refuse(thread: threading.Thread) -> None:
            if self.name is not None and thread.name.startswith(self.name):
                raise RuntimeError("can't start new thread")
            start(thread)

        patch.setattr(threading.Thread, "start", refuse)


@pytest.fixture
def no_thread(monkeypatch: pytest.MonkeyPatch) -> NoThread:
    return NoThread(monkeypatch)


@pytest.mark.parametrize("name", ["kvstore-page-watch", "kvstore-page-exists"])
def test_a_job_is_refused_where_no_thread_is_left(single: Pages, no_thread: NoThread, name: str) -> None:
    store = single.store()
    no_thread.name = name
    assert store.exists(keys(3)) == 0
    assert single.counted("pages_exists_no_resources") == 3
    no_thread.name = None
    assert store.put(keys(3), pages([5] * 3)).run == 3
    assert store.exists(keys(3)) == 3
    assert len(store._jobs) == 0


def test_one_thread_reads_from_all_nodes_where_no_other_is_left(single: Pages, no_thread: NoThread) -> None:
    store = single.store()
    names, stored = keys(len(SIZES)), pages(SIZES)
    assert store.put(names, stored).run == len(SIZES)
    assert 0 < sum(single.is_on(0, name) for name in names) < len(SIZES)
    no_thread.name = "kvstore-page-read"
    views = empty(SIZES)
    assert store.get_into(names, views).run == len(SIZES)
    assert [bytes(view) for view in views] == stored
    no_thread.name = None
    assert store.get_into(names, views).run == len(SIZES)


def test_a_read_that_was_refused_never_runs_later(single: Pages, no_thread: NoThread) -> None:
    """The executor keeps work that it has no thread for, and gives it to the next thread that starts."""
    store = single.store()
    names, stored = keys(len(SIZES)), pages(SIZES)
    assert store.put(names, stored).run == len(SIZES)
    no_thread.name = "kvstore-page-read"
    views = empty(SIZES)
    assert store.get_into(names, views).run == len(SIZES)
    for view in views:
        view[:] = bytes(len(view))
    no_thread.name = None
    readers = store._context.readers
    assert isinstance(readers, ThreadPoolExecutor)
    readers.submit(int).result()  # in order: all that waited has run
    assert not any(any(view) for view in views)


def test_a_job_ends_after_all_its_reads_though_one_of_them_fails(
    single: Pages, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = single.store()
    names, stored = keys(len(SIZES)), pages(SIZES)
    assert store.put(names, stored).run == len(SIZES)
    read, failed, under_way = GetPages._read_from_node, threading.Event(), []

    def fail_once(self: GetPages, wanted: list, *, hurried: bool) -> dict[int, str]:  # type: ignore[type-arg]
        if threading.current_thread().name.startswith("kvstore-page-get"):
            failed.set()
            raise ValueError("a mistake")
        under_way.append(wanted)
        assert failed.wait(60)
        try:
            return read(self, wanted, hurried=hurried)
        finally:
            under_way.remove(wanted)

    monkeypatch.setattr(GetPages, "_read_from_node", fail_once)
    views = empty(SIZES)
    result = store.get_into(names, views)
    assert under_way == []
    assert 0 < result.reasons.pop("internal_error") < len(SIZES)
    assert not result.reasons
    assert all(bytes(view) == body for view, body, ok in zip(views, stored, result.ok, strict=True) if ok)


def test_the_event_is_touched_with_the_lock_of_its_queue_only(
    single: Pages, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thread that sets an event which another one closes might write to a descriptor of somebody else's."""
    store = single.store()
    held: dict[str, bool] = {}
    for name in ("set", "clear", "close"):

        def touch(self: Event, name: str = name, real: object = getattr(Event, name)) -> None:
            held[name] = store._jobs._changed._is_owned()  # type: ignore[attr-defined]
            real(self)  # type: ignore[operator]

        monkeypatch.setattr(Event, name, touch)
    store.submit_exists(keys(1))
    store.close()
    store.finished()
    assert held == {"set": True, "clear": True, "close": True}
