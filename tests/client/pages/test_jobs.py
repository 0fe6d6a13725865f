"""Jobs: nobody waits for them who does not want to, and nothing of them stays behind."""

import os
import select
import threading
from pathlib import Path

import pytest

from kvstore_client import connect
from kvstore_client.pages.event import Event
from tests.client.pages.conftest import NAMESPACE, Pages, empty, keys, page, pages, wait_for

MOST_THREADS = 2 + 4 + 2 + 8 + 1
"""Of one store: for jobs of each kind, for reads from further nodes, and the watch."""


def test_results_are_polled_for(single: Pages) -> None:
    store = single.store()
    assert select.select([store.fileno()], [], [], 0)[0] == []
    names, stored = keys(5), pages([1000] * 5)
    put = store.submit_put(names, stored)
    ((job, result),) = wait_for(store, 1)
    assert (job, result.run) == (put, 5)
    assert select.select([store.fileno()], [], [], 0)[0] == []
    assert store.finished() == []
    views = empty([1000] * 5)
    jobs = [store.submit_exists(names), store.submit_get(names, views)]
    results = dict(wait_for(store, 2))
    assert set(results) == set(jobs)
    assert [results[job].run for job in jobs] == [5, 5]
    assert [bytes(view) for view in views] == stored
    store.unlock(names)


def test_a_caller_may_change_its_list_of_keys_after_submitting(single: Pages) -> None:
    store = single.store()
    names, views = keys(2), empty([1000] * 2)
    stored = pages([1000] * 2)
    submits = (
        lambda: store.submit_put(names, stored),
        lambda: store.submit_exists(names),
        lambda: store.submit_get(names, views),
    )
    for number, submit in enumerate(submits):
        with store._jobs._changed:  # no thread takes the job before the list is changed
            submit()
            names[:] = keys(2, first=10 + 2 * number)  # never stored
        ((_, result),) = wait_for(store, 1)
        assert result.ok == (True, True)
        names[:] = keys(2)
    assert [bytes(view) for view in views] == stored


def test_what_is_awaited_is_not_reported(single: Pages) -> None:
    store = single.store()
    store.put(keys(1), [b"page"])
    assert store.finished() == []


def test_a_full_queue_refuses_by_number(single: Pages) -> None:
    store = single.store(max_jobs=0)
    job = store.submit_exists(keys(3))
    ((finished, result),) = wait_for(store, 1)
    assert finished == job
    assert result.reasons == {"queue_full": 3}


def test_a_full_queue_refuses_by_bytes(single: Pages) -> None:
    store = single.store(max_bytes=1000)
    assert store.put(keys(1), [bytes(1001)]).reasons == {"queue_full": 1}
    assert store.put(keys(1), [bytes(1000)]).ok == (True,)
    assert store.get_into(keys(2), empty([500, 501])).reasons == {"queue_full": 2}
    assert store.get_into(keys(1), empty([1000])).ok == (True,)


def test_a_job_has_a_bounded_number_of_keys(single: Pages) -> None:
    store = single.store()
    assert store.exists(keys(16_385)) == 0
    assert single.counted("pages_exists_too_many_keys") == 16_385


def test_only_so_many_results_wait(single: Pages) -> None:
    store = single.store(max_jobs=0)
    jobs = [store.submit_exists(keys(1)) for _ in range(4100)]
    assert [job for job, _ in store.finished()] == jobs[4:]


def test_nothing_stays_behind(single: Pages) -> None:
    with single.store() as store:
        body, view = page(0, 3000), bytearray(3000)

        def operations(count: int) -> None:
            for number in range(count):
                name = keys(1, number % 10)
                assert store.put(name, [body]).ok == (True,)
                assert store.exists(name) == 1
                assert store.get_into(name, [view]).ok == (True,)
                store.unlock(name)

        operations(20)
        descriptors = open_descriptors()
        operations(250)  # 1,000 operations
        assert open_descriptors() <= descriptors
        assert len(own_threads()) <= MOST_THREADS
        assert view == body
        assert len(store._jobs) == len(store._context.locks) == 0
    single.cluster.check_nothing_is_held()
    assert own_threads() == []
    store.close()


def open_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def own_threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith(("kvstore-page", "kvstore-put"))]


def test_closing_unlocks(single: Pages) -> None:
    store = single.store()
    store.put(keys(3), pages([10] * 3))
    assert store.exists(keys(3)) == 3
    store.close()
    single.cluster.check_nothing_is_held()


def test_a_client_closes_its_page_stores(single: Pages) -> None:
    store = single.store()
    single.last_client.close()
    assert store.exists(keys(1)) == 0
    assert single.counted("pages_exists_closed") == 1


def test_a_store_of_a_closed_client_is_closed() -> None:
    client = connect("127.0.0.1:1")
    client.close()
    descriptors = open_descriptors()
    store = client.pages(NAMESPACE)
    assert store.is_closed
    assert open_descriptors() <= descriptors  # others of earlier tests may go meanwhile
    assert store.put(keys(1), [b"page"]).reasons == {"closed": 1}


@pytest.mark.parametrize("eventfd", [True, False])
def test_a_forked_child_has_an_event_of_its_own(eventfd: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not eventfd:
        monkeypatch.delattr(os, "eventfd")
    event = Event()
    number = event.fileno()
    shared, kept_open = os.dup(number), os.dup(event._write)  # the parent has both
    event.renew()
    assert event.fileno() == number
    event.set()
    assert select.select([number, shared], [], [], 0)[0] == [number]
    event.clear()
    assert select.select([number], [], [], 0)[0] == []
    event.close()
    os.close(shared)
    os.close(kept_open)
