import threading
import time

from kvstore_client.fetch.queue import StageQueue


def test_items_come_out_in_order_until_all_producers_closed() -> None:
    queue = StageQueue[int](10, producers=2)
    queue.put(1)
    queue.close()
    queue.put(2)
    queue.close()
    assert list(queue) == [1, 2]


def test_a_full_queue_holds_the_producer_back() -> None:
    queue = StageQueue[str](10)
    queue.put("a", 8)
    taken: list[str] = []

    def produce() -> None:
        queue.put("b", 8)
        taken.append("b is in")
        queue.close()

    producer = threading.Thread(target=produce)
    producer.start()
    time.sleep(0.05)
    assert not taken
    assert list(queue) == ["a", "b"]
    producer.join(60)
    assert taken


def test_an_item_heavier_than_the_queue_passes_alone() -> None:
    queue = StageQueue[str](10)
    assert queue.put("heavy", 99)
    queue.close()
    assert list(queue) == ["heavy"]


def test_abort_frees_a_blocked_producer_and_drops_what_waits() -> None:
    queue = StageQueue[int](1)
    queue.put(1)
    outcome: list[bool] = []
    producer = threading.Thread(target=lambda: outcome.append(queue.put(2)))
    producer.start()
    time.sleep(0.05)
    queue.abort()
    producer.join(60)
    assert outcome == [False]
    assert list(queue) == []


def test_abort_frees_a_blocked_consumer() -> None:
    queue = StageQueue[int](1)
    items: list[int] = []
    consumer = threading.Thread(target=lambda: items.extend(queue))
    consumer.start()
    time.sleep(0.05)
    queue.abort()
    consumer.join(60)
    assert not consumer.is_alive()
    assert items == []
