"""What a waiting engine is told, and when."""

import threading
import time

from kvstore_client.fetch.base import ReadTask
from kvstore_client.fetch.deliver import Delivery
from kvstore_client.fetch.plan import plan_reads
from kvstore_client.timeline import Timeline
from tests.client.chunks import MEMBER, SPEC, stored_chunks


def delivery_of(
    chunks: int, deadline_s: float = 5.0, stall_s: float = 5.0
) -> tuple[Delivery, list[ReadTask]]:
    tasks = plan_reads(stored_chunks(chunks))[MEMBER]
    return Delivery(
        tasks, layers=SPEC.layers, deadline_s=deadline_s, stall_s=stall_s, timeline=Timeline()
    ), tasks


def test_a_layer_is_there_when_all_chunks_have_it() -> None:
    delivery, tasks = delivery_of(2, deadline_s=0.3)
    for task in tasks[:2]:
        delivery.deliver(task)
    assert delivery.wait_layer(0)
    assert delivery.wait_layer(3)
    assert not delivery.wait_layer(4)
    assert delivery.report().missing == {0: "timeout", 1: "timeout"}


def test_a_missing_chunk_wakes_the_engine_at_once_and_keeps_what_came_before_it() -> None:
    delivery, tasks = delivery_of(3)
    outcome: list[bool] = []
    engine = threading.Thread(target=lambda: outcome.append(delivery.wait_layer(5)))
    engine.start()
    delivery.fail_chunks([task for task in tasks if task.chunk_index == 1][:1], "checksum")
    engine.join(2)
    assert outcome == [False]
    for task in tasks:
        if task.chunk_index != 1:
            delivery.deliver(task)
    delivery.wait()
    report = delivery.report()
    assert (report.delivered, report.missing, report.complete) == (1, {1: "checksum"}, False)


def test_a_fetch_that_receives_nothing_is_given_up_as_stalled() -> None:
    delivery, tasks = delivery_of(1, deadline_s=60, stall_s=0.2)
    delivery.deliver(tasks[0])
    started = time.monotonic()
    assert not delivery.wait_layer(5)
    assert time.monotonic() - started < 5
    assert delivery.report().missing == {0: "stalled"}


def test_end_frees_the_engine_and_tells_those_who_asked() -> None:
    delivery, _ = delivery_of(1)
    told: list[str] = []
    delivery.on_end(lambda: told.append("before"))
    outcome: list[bool] = []
    engine = threading.Thread(target=lambda: outcome.append(delivery.wait_layer(0)))
    engine.start()
    delivery.end("cancelled")
    engine.join(2)
    delivery.on_end(lambda: told.append("after"))
    assert outcome == [False]
    assert told == ["before", "after"]
    assert delivery.report().missing == {0: "cancelled"}


def test_everything_delivered_is_complete_even_when_ended_afterwards() -> None:
    delivery, tasks = delivery_of(2)
    for task in tasks:
        delivery.deliver(task)
    delivery.end("cancelled")
    assert delivery.report().complete
    assert delivery.report().missing == {}
