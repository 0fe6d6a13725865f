"""Whatever fails, pages come from a replica or are missing with a reason, in time."""

import socket
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Literal

import pytest

from kvstore_bench.shaping import ShapedLink
from kvstore_client import connect
from kvstore_client.pages import PageStore
from tests.client.conftest import served_cluster
from tests.client.pages.conftest import NAMESPACE, PATIENT, Pages, SlowPages, empty, keys, pages, wait_for

SIZES = [200_000] * 24


def test_a_replica_serves_what_a_dead_node_had(replicated: Pages) -> None:
    store = replicated.store()
    names, stored = keys(len(SIZES)), pages(SIZES)
    assert store.put(names, stored).run == len(SIZES)
    assert store.exists(names) == len(SIZES)
    replicated.cluster.stop_node(0)
    views = empty(SIZES)
    assert store.get_into(names, views).run == len(SIZES)  # it was found on the dead node
    assert [bytes(view) for view in views] == stored
    store.unlock(names)


def test_a_node_that_dies_in_the_middle_of_a_read(tmp_path: Path) -> None:
    names, stored = keys(len(SIZES)), pages(SIZES)
    with served_cluster(tmp_path, nodes=2, replicas=2, bulk=True) as cluster, ExitStack() as opened:
        addresses = [*(s.address for s in cluster.servers), *(b.address for b in cluster.bulk)]
        links = [opened.enter_context(ShapedLink(address, bandwidth_bps=1e9)) for address in addresses]
        routes = {address: link.address for address, link in zip(addresses, links, strict=True)}
        client = opened.enter_context(connect(cluster.address, routes=routes, **PATIENT))
        store = client.pages(NAMESPACE)
        assert store.put(names, stored).run == len(SIZES)
        assert store.exists(names) == len(SIZES)
        before = links[2].from_target_bytes
        links[2].set_bandwidth(20e6)
        views = empty(SIZES)
        job = store.submit_get(names, views)
        deadline_s = time.monotonic() + 30
        while links[2].from_target_bytes - before < 300_000:
            assert time.monotonic() < deadline_s
            time.sleep(0.001)
        links[0].cut()
        links[2].cut()
        results = dict(wait_for(store, 1))
        assert results[job].run == len(SIZES), results[job].reasons
        assert [bytes(view) for view in views] == stored


def test_without_a_replica_the_pages_of_a_dead_node_are_missing(single: Pages) -> None:
    store = single.store()
    names, stored = keys(len(SIZES)), pages(SIZES)
    assert store.put(names, stored).run == len(SIZES)
    dead = [single.is_on(0, name) for name in names]
    single.cluster.stop_node(0)
    views = empty(SIZES)
    result = store.get_into(names, views)
    assert result.ok == tuple(not is_dead for is_dead in dead)
    assert 0 < sum(result.reasons.values()) == sum(dead)
    assert all(bytes(view) == body for view, body, ok in zip(views, stored, result.ok, strict=True) if ok)


def test_a_put_lives_with_one_owner(replicated: Pages) -> None:
    store = replicated.store(settings={"put_stall_timeout_s": 1.0})
    assert store.exists(keys(1)) == 0
    replicated.cluster.stop_node(1)
    names, stored = keys(len(SIZES)), pages(SIZES)
    assert store.put(names, stored).run == len(SIZES)
    views = empty(SIZES)
    assert store.get_into(names, views).run == len(SIZES)
    assert [bytes(view) for view in views] == stored


def test_a_cluster_that_is_down_has_nothing(single: Pages) -> None:
    store = single.store(settings={"put_stall_timeout_s": 0.5})
    single.cluster.stop_storage()
    single.cluster.coordinator.stop(0)
    assert store.exists(keys(3)) == 0
    assert store.get_into(keys(3), empty([5] * 3)).reasons == {"unreachable": 3}
    assert store.put(keys(3), pages([5] * 3)).reasons == {"unreachable": 3}
    store.unlock(keys(3))


def test_nodes_that_go_down_after_a_lookup(single: Pages) -> None:
    store = single.store()
    names = keys(3)
    store.put(names, pages([5] * 3))
    assert store.exists(names) == 3
    single.cluster.stop_storage()
    assert store.get_into(names, empty([5] * 3)).run == 0
    assert store.exists(names) == 0
    store.unlock(names)


def test_nothing_is_written_after_the_deadline(slow: PageStore) -> None:
    view = bytearray(4_000_000)
    result = slow.get_into(keys(1), [view], timeout_s=0.4)
    assert result.reasons == {"timeout": 1}
    mark = bytes(range(1, 251)) * 16_000
    view[:] = mark
    other = bytearray(5)
    slow.get_into(keys(1, 1), [other], timeout_s=1.0)  # time passes in which nothing may arrive
    assert view == mark


def test_a_job_that_waits_too_long_for_its_turn_ends_at_its_deadline(slow: PageStore) -> None:
    views = empty([4_000_000] * 4)
    running = [slow.submit_get(keys(1), [view], timeout_s=5.0) for view in views]
    queued = slow.submit_get(keys(1), [bytearray(4_000_000)], timeout_s=0.2)
    first = wait_for(slow, 1)
    assert [job for job, _ in first] == [queued]
    assert first[0][1].reasons == {"timeout": 1}
    assert {job for job, _ in wait_for(slow, 4)} == set(running)


@pytest.mark.parametrize("operation", ["get", "put"])
def test_a_node_is_not_blamed_for_a_store_that_closes(
    slow_node: SlowPages, operation: Literal["get", "put"]
) -> None:
    """Other stores of the client, and its prompts, go on with the node."""
    store, view = slow_node.store, slow_node.client._view
    if operation == "get":
        job = store.submit_get(keys(1), [bytearray(4_000_000)])
    else:
        job = store.submit_put(keys(1, 1), [bytes(4_000_000)])
    store.close()
    ((finished, result),) = store.finished()
    assert finished == job
    assert result.reasons == {"closed": 1}
    assert not view.is_paused(slow_node.endpoint)


def test_a_node_is_not_blamed_for_a_short_deadline(slow_node: SlowPages) -> None:
    result = slow_node.store.put(keys(1, 1), [bytes(4_000_000)], timeout_s=0.3)
    assert result.reasons == {"timeout": 1}
    assert not slow_node.client._view.is_paused(slow_node.endpoint)


def test_closing_ends_jobs(slow: PageStore) -> None:
    job = slow.submit_get(keys(1), [bytearray(4_000_000)])
    slow.close()
    ((finished, result),) = slow.finished()
    assert finished == job
    assert not any(result.ok)
    assert slow.put(keys(1), [b"late"]).reasons == {"closed": 1}
    assert not any(t.name.startswith("kvstore-page") for t in threading.enumerate())


@pytest.mark.parametrize("operation", ["exists", "get_into", "put"])
def test_a_coordinator_that_never_answered_is_not_waited_for_beyond_the_deadline(
    operation: Literal["exists", "get_into", "put"],
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        with connect(address, lookup_timeout_s=600.0) as client, client.pages(NAMESPACE) as store:
            views = {"exists": (), "get_into": (empty([5]),), "put": (pages([5]),)}[operation]
            getattr(store, operation)(keys(1), *views, timeout_s=0.2)
            counted = client.metrics.snapshot()
            assert counted[f"pages_{operation.removesuffix('_into')}_unreachable"] == 1
            # The next lookup has more time, and asks for itself.
            assert not client._view.is_paused(address)
