"""Pages come back as they were stored, whatever their size, and never as anything else."""

import threading

import numpy as np
import pytest

from kvstore_client.pages import PageNamespace
from kvstore_codec.errors import ConfigurationError
from tests.client.pages.conftest import NAMESPACE, Pages, empty, keys, page, pages
from tests.damage import flip_bit

SIZES = [1, 2, 7, 8, 9, 10, 255, 256, 4095, 4097, 65_536, 65_537, 1_000_003, 3 << 20]


def test_pages_of_any_size_come_back(single: Pages) -> None:
    store = single.store()
    stored = pages(SIZES)
    assert store.put(keys(len(SIZES)), stored).ok == (True,) * len(SIZES)
    assert store.exists(keys(len(SIZES))) == len(SIZES)
    views = empty(SIZES)
    assert store.get_into(keys(len(SIZES)), views).ok == (True,) * len(SIZES)
    assert [bytes(view) for view in views] == stored
    store.unlock(keys(len(SIZES)))
    single.cluster.check_nothing_is_held()


def test_a_page_of_more_than_a_receive_buffer_comes_back(single: Pages) -> None:
    size_bytes = (33 << 20) + 5
    store = single.store()
    stored = page(0, size_bytes)
    assert store.put(keys(1), [stored]).ok == (True,)
    view = bytearray(size_bytes)
    assert store.get_into(keys(1), [view]).ok == (True,)
    assert view == stored


def test_compressed_pages_come_back(single: Pages) -> None:
    stored = [bytes(size_bytes) for size_bytes in SIZES] + pages(SIZES)
    names, sizes = keys(len(stored)), SIZES * 2
    compressing = single.store(encoding="exact-zstd")
    assert compressing.put(names, stored).ok == (True,) * len(names)
    assert sum(node.stats().bytes_used for node in single.cluster.nodes) < 1.5 * sum(SIZES)
    reading = single.store()
    views = empty(sizes)
    assert reading.get_into(names, views).ok == (True,) * len(names)
    assert [bytes(view) for view in views] == stored


@pytest.mark.slow
def test_ten_thousand_pages(roomy: Pages) -> None:
    store = roomy.store()
    count, batch = 10_000, 500
    sizes = [1 + (number * 37) % 2000 for number in range(count)]
    stored = pages(sizes)
    names = keys(count)
    for begin in range(0, count, batch):
        result = store.put(names[begin : begin + batch], stored[begin : begin + batch])
        assert result.run == batch, result.reasons
    for begin in range(0, count, batch):
        assert store.exists(names[begin : begin + batch]) == batch
    for begin in range(0, count, batch):
        views = empty(sizes[begin : begin + batch])
        assert store.get_into(names[begin : begin + batch], views).run == batch
        assert [bytes(view) for view in views] == stored[begin : begin + batch]
    store.unlock(names)
    roomy.cluster.check_nothing_is_held()


def test_a_run_ends_at_the_first_page_that_is_missing(single: Pages) -> None:
    store = single.store()
    names = keys(10)
    store.put(names, pages([100] * 10))
    for node in single.cluster.nodes:
        node.delete(NAMESPACE.chunk_ids(names[6:7]))
    assert store.exists(names) == 6
    views = empty([100] * 10)
    result = store.get_into(names, views)
    assert result.ok == (True,) * 6 + (False,) + (True,) * 3
    assert result.reasons == {"not_stored": 1}
    assert [bytes(view) for view in views[7:]] == pages([100] * 10)[7:]
    store.unlock(names)
    single.cluster.check_nothing_is_held()


def test_a_page_that_goes_after_the_lookup_is_missing(single: Pages) -> None:
    store = single.store()
    names = keys(4)
    store.put(names, pages([100] * 4))
    assert store.exists(names) == 4
    for node in single.cluster.nodes:
        node.delete(NAMESPACE.chunk_ids(names[1:2]))
    result = store.get_into(names, empty([100] * 4))
    assert result.ok == (True, False, True, True)
    assert result.reasons == {"gone": 1}


def test_a_damaged_page_is_missing(single: Pages) -> None:
    store = single.store()
    names = keys(3)
    store.put(names, pages([5000] * 3))
    damage(single, 0, 1)
    damage(single, 1, 1)
    result = store.get_into(names, empty([5000] * 3))
    assert result.ok == (True, False, True)
    assert result.reasons == {"checksum": 1}
    assert single.counted("pages_get_checksum") == 1


def test_a_damaged_page_comes_from_the_replica(replicated: Pages) -> None:
    store = replicated.store()
    names, stored = keys(8), pages([5000] * 8)
    store.put(names, stored)
    for number in range(8):
        damage(replicated, 0, number)
    views = empty([5000] * 8)
    assert store.get_into(names, views).ok == (True,) * 8
    assert [bytes(view) for view in views] == stored
    assert replicated.counted("failover_checksum") == 1


def damage(pages_: Pages, node: int, number: int) -> None:
    """Where the node has the page, a bit of it turns over."""
    (chunk_id,) = NAMESPACE.chunk_ids(keys(1, number))
    if not pages_.is_on(node, *keys(1, number)):
        return
    with pages_.cluster.nodes[node].open(chunk_id, "exact-raw") as reader:
        (piece,) = reader.pieces(0, 1, 1 << 20)
        flip_bit(piece[0])


@pytest.mark.parametrize("encoding", ["exact-raw", "exact-zstd"])
@pytest.mark.parametrize("size_bytes", [1, 4999, 5001, 100_000])
def test_a_view_of_another_size_gets_nothing(single: Pages, encoding: str, size_bytes: int) -> None:
    store = single.store(encoding=encoding)
    store.put(keys(2), pages([5000] * 2))
    views = [bytearray(size_bytes), bytearray(5000)]
    result = store.get_into(keys(2), views)
    assert result.ok == (False, True)
    assert result.reasons == {"wrong_size": 1}
    assert views[1] == page(1, 5000)


def test_views_that_are_no_rows_of_bytes_are_refused(single: Pages) -> None:
    store = single.store()
    columns = np.zeros((8, 8), np.uint8)[:, ::2]
    assert store.put(keys(3), [columns, b"", b"x"]).reasons == {"bad_view": 2}
    assert store.get_into(keys(3), [columns, b"read-only", bytearray(1)]).ok == (False, False, True)
    assert store.put(keys(3), [b"too few"]).reasons == {"bad_view": 3}


def test_arrays_of_any_shape_are_rows_of_bytes(single: Pages) -> None:
    store = single.store()
    array = np.random.default_rng(0).standard_normal((3, 4, 5))
    assert store.put(keys(1), [array]).ok == (True,)
    view = np.empty((60,), np.float64)
    assert store.get_into(keys(1), [view]).ok == (True,)
    assert np.array_equal(view.reshape(3, 4, 5), array)


def test_storing_again_counts_as_stored_and_changes_nothing(single: Pages) -> None:
    store = single.store()
    first, second = page(0, 1000), page(1, 1000)
    assert store.put(keys(1), [first]).ok == (True,)
    assert store.put(keys(1), [second]).ok == (True,)
    view = bytearray(1000)
    assert store.get_into(keys(1), [view]).ok == (True,)
    assert view == first


def test_many_may_store_one_page(single: Pages) -> None:
    stores = [single.store() for _ in range(4)]
    bodies = [page(number, 10_000) for number in range(4)]
    results = []
    threads = [
        threading.Thread(target=lambda store=store, body=body: results.append(store.put(keys(1), [body])))
        for store, body in zip(stores, bodies, strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [result.ok for result in results] == [(True,)] * 4
    view = bytearray(10_000)
    assert stores[0].get_into(keys(1), [view]).ok == (True,)
    assert bytes(view) in bodies


def test_namespaces_and_tenants_never_meet(single: Pages) -> None:
    salted = PageNamespace(NAMESPACE.model, NAMESPACE.layout, 1, 2, b"salt")
    others = [
        PageNamespace(b"another model", NAMESPACE.layout, 1, 2),
        PageNamespace(NAMESPACE.model, "another layout", 1, 2),
        PageNamespace(NAMESPACE.model, NAMESPACE.layout, 0, 2),
        PageNamespace(NAMESPACE.model, NAMESPACE.layout, 1, 3),
        salted,
    ]
    single.store().put(keys(1), [b"mine"])
    for namespace in others:
        assert single.store(namespace).exists(keys(1)) == 0
    assert single.store(settings={"tenant_salt": "another tenant"}).exists(keys(1)) == 0
    assert single.store().exists(keys(1)) == 1


def test_nothing_asked_for_is_nothing_done(single: Pages) -> None:
    store = single.store()
    assert store.exists([]) == 0
    assert store.get_into([], []).ok == ()
    assert store.put([], []).ok == ()
    store.unlock([])


def test_a_locked_page_is_read_without_a_lookup_and_unlocked_once(single: Pages) -> None:
    store = single.store()
    names = keys(6)
    store.put(names, pages([50] * 6))
    assert store.exists(names) == 6
    assert store.exists(names[:2]) == 2
    lookups = sum(node.stats().counters["lookups"] for node in single.cluster.nodes)
    assert store.get_into(names, empty([50] * 6)).run == 6
    assert sum(node.stats().counters["lookups"] for node in single.cluster.nodes) == lookups
    store.unlock(names)
    assert sum(node.stats().leases for node in single.cluster.nodes) > 0
    store.unlock([*names, *keys(3, 100)])
    single.cluster.check_nothing_is_held()


def test_pages_have_no_resolution(single: Pages) -> None:
    """It would be stored under a name that nobody asks for."""
    with pytest.raises(ConfigurationError, match="exact-raw@8"):
        single.store(encoding="exact-raw@8")
