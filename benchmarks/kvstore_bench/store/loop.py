"""What every measured system's client process runs: one implementation, so that all are timed alike.

Standard library only, because a peer's script imports this file under the peer's own Python. Commands come as lines
of JSON on stdin, `["name", {...}]`, and each is answered with one line on stdout: what the command returns, or
`{"error": text}`.

    resident {size_bytes, keys}     make a value for each key, store it, and read it back byte for byte
    time {method, seconds}          call a `get...` or `put...` method on the keys in turn: the seconds each call took
    check {}                        read every value back byte for byte
    forget {}                       remove them
"""

import json
import random
import sys
import time
from collections.abc import Callable
from typing import Any, Protocol

SETTLE_S = 0.002


class Store(Protocol):
    """A client of one system. Buffers are made in `value` and `receive`, untimed, as an engine would keep them."""

    def value(self, key: int, size_bytes: int, noise: random.Random) -> Any:
        """`size_bytes` bytes that are like no other key's, in the form that `put` takes."""

    def content(self, value: Any) -> bytes: ...

    def put(self, key: int, value: Any) -> None:
        """Returns when the store has said that it has it. Raises anything when it has not."""

    def get(self, key: int, size_bytes: int) -> Any:
        """Something with the value's bytes, in memory of this process."""

    def delete(self, key: int) -> None: ...


def serve(store: Store) -> None:
    """Until stdin ends."""
    worker = _Worker(store)
    for line in sys.stdin:
        name, arguments = json.loads(line)
        try:
            answer = worker.run(name, **arguments)
        except Exception as error:  # whatever a system raises is the benchmark's to show
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), flush=True)


class _Worker:
    def __init__(self, store: Store) -> None:
        self._store = store
        self._values: dict[int, Any] = {}
        self._size_bytes = 0

    def run(self, name: str, **arguments: Any) -> Any:
        commands: dict[str, Callable[..., Any]] = {
            "resident": self.resident,
            "time": self.time,
            "check": self.check,
            "forget": self.forget,
        }
        return commands[name](**arguments)

    def resident(self, size_bytes: int, keys: list[int]) -> None:
        self._size_bytes = size_bytes
        for key in keys:
            self._values[key] = value = self._store.value(key, size_bytes, random.Random(key))
            self._store.put(key, value)
        self.check()

    def check(self) -> None:
        for key, value in self._values.items():
            found = bytes(self._store.get(key, self._size_bytes))
            if found != self._store.content(value):
                raise ValueError(f"the value of key {key} came back changed")

    def forget(self) -> None:
        for key in self._values:
            self._store.delete(key)
        self._values.clear()

    def time(self, method: str, seconds: float) -> list[float]:
        call = getattr(self._store, method)
        cycle = self._put_all if method.startswith("put") else self._get_all
        cycle(call)  # to warm up
        times: list[float] = []
        end = time.perf_counter() + seconds
        while not times or time.perf_counter() < end:
            times += cycle(call)
        return times

    def _get_all(self, get: Callable[[int, int], Any]) -> list[float]:
        times = []
        for key in self._values:
            begin = time.perf_counter()
            value = get(key, self._size_bytes)
            times.append(time.perf_counter() - begin)
            if len(value) != self._size_bytes:
                raise ValueError(f"key {key} has {len(value)} bytes instead of {self._size_bytes}")
            del value  # its buffer, where there is one, is free for the next
        return times

    def _put_all(self, put: Callable[[int, Any], None]) -> list[float]:
        for key in self._values:
            self._store.delete(key)
        # What a server does behind its last answer shall not be charged to the first put.
        time.sleep(SETTLE_S)
        times = []
        for key, value in self._values.items():
            begin = time.perf_counter()
            put(key, value)
            times.append(time.perf_counter() - begin)
        return times
