"""The loop that every system's client runs: what it times, and what it finds out."""

import io
import json
import random
import sys

import pytest

from kvstore_bench.store import loop


class Memory:
    """A store that keeps values, and changes one of them when told to."""

    def __init__(self) -> None:
        self.kept: dict[int, bytes] = {}

    def value(self, key: int, size_bytes: int, noise: random.Random) -> bytes:
        return noise.randbytes(size_bytes)

    def content(self, value: bytes) -> bytes:
        return value

    def put(self, key: int, value: bytes) -> None:
        if key in self.kept:
            raise KeyError("stored already")
        self.kept[key] = value

    def get(self, key: int, size_bytes: int) -> bytes:
        return self.kept[key]

    def delete(self, key: int) -> None:
        del self.kept[key]


def converse(
    store: Memory,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    *commands: tuple[str, dict],
) -> list:
    monkeypatch.setattr(
        sys, "stdin", io.StringIO("".join(json.dumps(command) + "\n" for command in commands))
    )
    loop.serve(store)
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


RESIDENT = ("resident", {"size_bytes": 100, "keys": [1, 2, 3]})


def test_operations_are_timed_and_leave_what_was_there(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    store = Memory()
    gets, puts = ({"method": method, "seconds": 0.01} for method in ("get", "put"))
    answers = converse(
        store, monkeypatch, capsys, RESIDENT, ("time", gets), ("time", puts), ("check", {}), ("forget", {})
    )
    assert answers[0] is answers[3] is answers[4] is None
    for times in answers[1:3]:
        assert times
        assert all(took_s >= 0 for took_s in times)
    assert store.kept == {}


def test_values_differ_and_changed_ones_are_found_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    store = Memory()
    assert converse(store, monkeypatch, capsys, RESIDENT) == [None]
    assert len(set(store.kept.values())) == 3

    class Changing(Memory):
        def get(self, key: int, size_bytes: int) -> bytes:
            return bytes(size_bytes) if key == 2 else super().get(key, size_bytes)

    ((answer),) = converse(Changing(), monkeypatch, capsys, RESIDENT)
    assert "key 2 came back changed" in answer["error"]


def test_a_value_of_another_length_is_found_out_while_timing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Cutting(Memory):
        def get_less(self, key: int, size_bytes: int) -> bytes:
            return self.kept[key][1:]

    timed = ("time", {"method": "get_less", "seconds": 0.01})
    answers = converse(Cutting(), monkeypatch, capsys, RESIDENT, timed)
    assert "99 bytes instead of 100" in answers[1]["error"]
