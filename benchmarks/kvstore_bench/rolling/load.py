"""Clients that read and store pages all the time, and count what they get."""

import random
import threading
import time
from collections import Counter
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

import numpy as np

from kvstore_client import KVStoreClient, connect
from kvstore_client.pages import PageNamespace, PageStore

PAGE_BYTES = 64 << 10
_RUN_PAGES = 8
_STORE_PERIOD_S = 0.25
_FOUND_WITHIN_S = 60.0


@dataclass(slots=True)
class Phase:
    """What clients saw while something was done. A failed fetch raised, or gave wrong bytes, or outlived its time limit
    by more than a second; missing pages are those that an engine would have computed."""

    name: str
    began_s: float
    seconds: float = 0.0
    failed: int = 0
    pages: int = 0
    missing: Counter[str] = field(default_factory=Counter)
    latencies_s: list[float] = field(default_factory=list)
    stored: int = 0
    not_stored: Counter[str] = field(default_factory=Counter)

    def row(self) -> dict[str, Any]:
        missing = self.missing.total()
        latencies_ms = 1000 * np.array(self.latencies_s or [0.0])
        return {
            "phase": self.name,
            "seconds": round(self.seconds, 1),
            "fetches": len(self.latencies_s),
            "failed_fetches": self.failed,
            "pages": self.pages,
            "missing_pages": missing,
            "missing": dict(self.missing),
            "hit_rate": round(1 - missing / max(1, self.pages), 5),
            "p50_ms": round(float(np.percentile(latencies_ms, 50)), 2),
            "p99_ms": round(float(np.percentile(latencies_ms, 99)), 2),
            "max_ms": round(float(np.max(latencies_ms)), 1),
            "stored_pages": self.stored,
            "not_stored": dict(self.not_stored),
        }


@dataclass(frozen=True, slots=True)
class Fetch:
    """A fetch that began at `began_s` (`time.monotonic`)."""

    phase: str
    began_s: float
    seconds: float
    missing: int


class Load:
    """`readers` threads that fetch runs of pages, and one that stores a new page a few times a second, each with a
    client of its own, made with `settings`. A context manager."""

    def __init__(
        self,
        settings: dict[str, Any],
        *,
        pages: int,
        readers: int,
        pause_s: float = 0.0,
        fetch_timeout_s: float = 5.0,
    ) -> None:
        """Each reader waits for `pause_s` after a fetch."""
        self._settings = settings | {"fetch_timeout_s": fetch_timeout_s, "put_durability": "durable"}
        self._fetch_timeout_s, self._readers, self._pause_s = fetch_timeout_s, readers, pause_s
        self._clients: list[KVStoreClient] = []
        self._lock = threading.Lock()
        self._ending = threading.Event()
        self._pool = ThreadPoolExecutor(readers + 1)
        self._running: list[Future[None]] = []
        self._namespace = PageNamespace(b"rolling restart", "random", 0, 1)
        self._phase = Phase("", time.monotonic())
        self.acknowledged: list[int] = []
        """Numbers of the pages that the service has stored durably."""
        self.fetches: list[Fetch] = []
        store = self._store()
        for first in range(0, pages, 50):
            self._put(store, list(range(first, min(pages, first + 50))))
        self._phase = Phase("", time.monotonic())

    def begin(self, name: str) -> Phase:
        """Ends a phase and begins the next one. Returns the ended one."""
        with self._lock:
            ended, self._phase = self._phase, Phase(name, time.monotonic())
            ended.seconds = self._phase.began_s - ended.began_s
        return ended

    def lost(self) -> list[int]:
        """Acknowledged pages that cannot be read, or have other bytes than were stored, after some attempts."""
        store = self._store()
        left = list(self.acknowledged)
        deadline_s = time.monotonic() + _FOUND_WITHIN_S
        while left and time.monotonic() < deadline_s:
            left = [
                number
                for number in left
                if time.monotonic() > deadline_s or not self._is_right(store, number)
            ]
        return left

    def __enter__(self) -> Self:
        self._running = [
            self._pool.submit(self._read, random.Random(number)) for number in range(self._readers)
        ]
        self._running.append(self._pool.submit(self._write))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ending.set()
        self._pool.shutdown()
        for running in self._running:
            running.result()  # a thread that has ended early has measured nothing since

    def close(self) -> None:
        for client in self._clients:
            client.close()

    def _store(self) -> PageStore:
        client = connect(**self._settings)
        self._clients.append(client)
        return client.pages(self._namespace)

    def _read(self, chance: random.Random) -> None:
        store = self._store()
        views = [bytearray(PAGE_BYTES) for _ in range(_RUN_PAGES)]
        while not self._ending.wait(self._pause_s):
            with self._lock:
                numbers = chance.sample(self.acknowledged, _RUN_PAGES)
            began_s, failed, result = time.monotonic(), 0, None
            try:
                result = store.get_into([_key(number) for number in numbers], views)
            except Exception:  # what an engine must never see
                failed = 1
            taken_s = time.monotonic() - began_s
            if result is not None:
                right = all(
                    view == _page(number)
                    for number, view, ok in zip(numbers, views, result.ok, strict=True)
                    if ok
                )
                failed = int(not right or taken_s > self._fetch_timeout_s + 1.0)
            with self._lock:
                self._phase.latencies_s.append(taken_s)
                self._phase.failed += failed
                self._phase.pages += _RUN_PAGES
                missing = _RUN_PAGES - (sum(result.ok) if result is not None else 0)
                self.fetches.append(Fetch(self._phase.name, began_s, taken_s, missing))
                if result is not None:
                    self._phase.missing.update(result.reasons)

    def _write(self) -> None:
        store = self._store()
        number = len(self.acknowledged)
        while not self._ending.wait(_STORE_PERIOD_S):
            self._put(store, [number])
            number += 1

    def _put(self, store: PageStore, numbers: list[int]) -> None:
        result = store.put([_key(number) for number in numbers], [_page(number) for number in numbers])
        with self._lock:
            self.acknowledged += [number for number, ok in zip(numbers, result.ok, strict=True) if ok]
            self._phase.stored += sum(result.ok)
            self._phase.not_stored.update(result.reasons)

    def _is_right(self, store: PageStore, number: int) -> bool:
        view = bytearray(PAGE_BYTES)
        return store.get_into([_key(number)], [view]).ok == (True,) and view == _page(number)


def _key(number: int) -> bytes:
    return b"page %d" % number


def _page(number: int) -> bytes:
    return random.Random(number).randbytes(PAGE_BYTES)
