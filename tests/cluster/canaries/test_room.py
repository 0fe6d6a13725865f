"""Which canaries go so that a new one fits."""

from kvstore_cluster.canaries.base import CanaryRecord
from kvstore_cluster.canaries.room import making_room


def record(number: int, client: str = "a", size_bytes: int = 1) -> CanaryRecord:
    return CanaryRecord(bytes([number]) * 32, 0, size_bytes=size_bytes, client=client)


def numbers(records: list[CanaryRecord]) -> list[int]:
    return [record.model_digest[0] for record in records]


def test_while_there_is_room_none_goes() -> None:
    assert making_room([record(1), record(2)], record(3), 3, 3) == []


def test_those_used_longest_ago_go_until_there_is_room() -> None:
    kept = [record(number) for number in range(5)]
    assert numbers(making_room(kept, record(9), 4, 100)) == [0, 1]
    assert numbers(making_room(kept, record(9, size_bytes=3), 100, 5)) == [0, 1, 2]


def test_whoever_holds_its_share_makes_room_with_its_own() -> None:
    kept = [
        record(1, "large"),
        record(2, "large"),
        record(3, "small"),
        record(4, "large"),
        record(5, "small"),
    ]
    assert numbers(making_room(kept, record(9, "small"), 5, 100)) == [3]
    assert numbers(making_room(kept, record(9, "large"), 5, 100)) == [1]


def test_a_newcomer_takes_from_who_holds_most() -> None:
    kept = [record(0, "small"), *(record(number, "large") for number in range(1, 16))]
    assert numbers(making_room(kept, record(99, "new"), 16, 1000)) == [1]


def test_what_does_not_fit_at_all_ends() -> None:
    assert numbers(making_room([record(1)], record(2, size_bytes=10), 5, 5)) == [1]
