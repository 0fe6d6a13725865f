"""The load process, which puts new documents and gets old ones until its standard input is closed.

    python -m kvstore_bench.faults.load ADDRESS SEED PUTS_PER_S GETS_PER_S

Puts and gets use the same client as engines. Each writes an `Event` to standard output.
"""

import logging
import random
import sys
import threading
import time
from collections.abc import Callable
from contextlib import closing

import grpc
import torch

from kvstore_bench.faults.copies import Copies
from kvstore_bench.faults.documents import CHUNKS, ENCODING, SPEC, Document
from kvstore_bench.faults.events import Event
from kvstore_client import KVStoreClient, connect
from kvstore_codec.identity import ChunkId

_PUTTERS = 2
_GETTERS = 2
_HOLDERS_PATIENCE_S = 10.0
_HOLDERS_PAUSE_S = 0.2


class Load:
    """Puts and gets documents until `stop`. Thread-safe."""

    def __init__(self, address: str, seed: int) -> None:
        self._address = address
        self._seed = seed
        self._stopped = threading.Event()
        self._lock = threading.Lock()
        self._acknowledged: list[Document] = []

    def stop(self) -> None:
        self._stopped.set()

    def put(self, per_s: float, number: int) -> None:
        """Stores documents one after the other."""
        numbers = iter(range(number, 1 << 20, _PUTTERS))

        def step(client: KVStoreClient, _: random.Random) -> Event:
            document = Document(next(numbers))
            begin_s = time.monotonic()
            stored = client.store.put(SPEC, document.chunks()).result()
            end_s = time.monotonic()
            if stored == CHUNKS:
                with self._lock:
                    self._acknowledged.append(document)
            return Event("put", document.number, begin_s, end_s, stored)

        self._repeat(step, per_s, self._seed + _GETTERS + number)

    def get(self, per_s: float, number: int) -> None:
        """Fetches acknowledged documents in random order."""
        self._repeat(self._get, per_s, self._seed + number)

    def _repeat(
        self, step: Callable[[KVStoreClient, random.Random], Event | None], per_s: float, seed: int
    ) -> None:
        chance = random.Random(seed)
        torch.set_num_threads(1)
        with connect(self._address, encoding=ENCODING, put_durability="durable", tenant="") as client:
            while not self._stopped.wait(chance.expovariate(per_s)):
                event = step(client, chance)
                if event is not None:
                    with self._lock:
                        sys.stdout.write(event.to_line() + "\n")
                        sys.stdout.flush()

    def _get(self, client: KVStoreClient, chance: random.Random) -> Event | None:
        with self._lock:
            document = chance.choice(self._acknowledged) if self._acknowledged else None
        if document is None:
            return None
        ids = document.ids()
        begin_s = time.monotonic()
        match = client.match(SPEC, ids)
        if not match.chunks:
            end_s = time.monotonic()
            reason = _last_reason(client)
            return Event("get", document.number, begin_s, end_s, 0, 0, reason, self._holders(ids[0]))
        buffers = client.buffers.acquire(SPEC, match.tokens)
        report = client.fetch(match, buffers, None).wait()
        end_s = time.monotonic()
        wrong = document.wrong_bytes(buffers.keys, buffers.values, report.delivered)
        client.buffers.release(buffers)
        if report.delivered == CHUNKS:
            return Event("get", document.number, begin_s, end_s, CHUNKS, wrong)
        reason = ", ".join(sorted(set(report.missing.values()))) or "not found"
        holders = self._holders(ids[report.delivered])
        return Event("get", document.number, begin_s, end_s, report.delivered, wrong, reason, holders)

    def _holders(self, chunk_id: ChunkId) -> tuple[str, ...]:
        """Nodes that have the chunk now. Waits until the coordinator answers with the members."""
        deadline_s = time.monotonic() + _HOLDERS_PATIENCE_S
        with closing(Copies(self._address)) as copies:
            while True:
                try:
                    members = copies.members()
                    break
                except grpc.RpcError:
                    if time.monotonic() > deadline_s:
                        return ()
                    time.sleep(_HOLDERS_PAUSE_S)
            found = []
            for member in members:
                try:
                    if copies.held(member, [chunk_id])[0]:
                        found.append(member.node_id)
                except grpc.RpcError:
                    continue  # a node that is down cannot deliver the chunk
            return tuple(found)


def _last_reason(client: KVStoreClient) -> str:
    counts = {name: n for name, n in client.metrics.snapshot().items() if name.startswith("miss_")}
    return ", ".join(f"{name.removeprefix('miss_')} {n}" for name, n in sorted(counts.items())) or "not found"


def main() -> None:
    logging.getLogger("kvstore_client").setLevel(logging.ERROR)  # lost nodes are expected
    address, seed, puts_per_s, gets_per_s = sys.argv[1:]
    load = Load(address, int(seed))
    jobs = [(load.put, float(puts_per_s) / _PUTTERS, number) for number in range(_PUTTERS)]
    jobs += [(load.get, float(gets_per_s) / _GETTERS, number) for number in range(_GETTERS)]
    threads = [threading.Thread(target=job, args=arguments) for job, *arguments in jobs]
    for thread in threads:
        thread.start()
    sys.stdin.read()
    load.stop()
    for thread in threads:
        thread.join()


if __name__ == "__main__":
    main()
