"""The measuring loop of every client process. All systems share this implementation, so that all are timed alike.

Uses only the standard library, because a peer's script imports this file in the peer's own Python environment. Each
line of stdin is a command in JSON, `["name", {...}]`. Each is answered by one line on stdout: the result of the
command, or `{"error": text}`.

    resident {size_bytes, keys}     make a value for each key, put it, get it and compare it byte for byte
    time {method, seconds}          call a `get...` or `put...` method for the keys in turn; returns the seconds of each
                                    call
    check {}                        get every value and compare it byte for byte
    forget {}                       delete all values
"""

import json
import random
import sys
import time
from collections.abc import Callable
from typing import Any, Protocol

SETTLE_S = 0.002
"""Pause between the deletes and the puts of a cycle."""


class Store(Protocol):
    """A client of one system. `value` allocates all buffers, untimed, as an engine allocates its buffers once."""

    def value(self, key: int, size_bytes: int, noise: random.Random) -> Any:
        """Makes the value of `key`: `size_bytes` of `noise`, in the form that `put` takes."""

    def content(self, value: Any) -> bytes:
        """The bytes of a value that `value` made."""

    def put(self, key: int, value: Any) -> None:
        """Puts a value. Returns when the store has acknowledged it. Raises any exception if the put failed."""

    def get(self, key: int, size_bytes: int) -> Any:
        """Returns the bytes of a value, as an object with the buffer protocol in memory of this process."""

    def delete(self, key: int) -> None:
        """Deletes a value."""


def serve(store: Store) -> None:
    """Executes commands until stdin ends."""
    worker = _Worker(store)
    for line in sys.stdin:
        name, arguments = json.loads(line)
        try:
            answer = worker.run(name, **arguments)
        except Exception as error:  # the benchmark reports any error of a system
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
        cycle(call)  # warms up
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
            del value  # frees its buffer for the next call
        return times

    def _put_all(self, put: Callable[[int, Any], None]) -> list[float]:
        for key in self._values:
            self._store.delete(key)
        # Let the server finish its work for the deletes, so that the first put does not wait for it.
        time.sleep(SETTLE_S)
        times = []
        for key, value in self._values.items():
            begin = time.perf_counter()
            put(key, value)
            times.append(time.perf_counter() - begin)
        return times
