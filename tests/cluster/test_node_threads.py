"""Many threads against one small node: whatever they do, nobody ever reads other bytes than were put."""

import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from kvstore_cluster.arena import Arena
from kvstore_cluster.lookup import LookupRequest
from kvstore_cluster.node import StorageNode
from kvstore_codec.errors import ArenaFullError, ChunkNotFoundError
from tests.sample_chunk import SampleChunk, sample_chunk

CHUNKS = 24
RUN_S = 1.5


@pytest.fixture
def chunks() -> list[SampleChunk]:
    return [sample_chunk(content=number, frame_bytes=5000) for number in range(CHUNKS)]


def run_for(seconds: float, *workers: Callable[[random.Random], None]) -> None:
    """Repeats every worker in a thread of its own; an error in any of them fails the test."""
    stop = threading.Event()

    def repeat(number: int, worker: Callable[[random.Random], None]) -> int:
        generator = random.Random(number)
        rounds = 0
        try:
            while not stop.is_set():
                worker(generator)
                rounds += 1
        finally:
            stop.set()
        return rounds

    with ThreadPoolExecutor(len(workers)) as pool:
        futures = [pool.submit(repeat, number, worker) for number, worker in enumerate(workers)]
        stop.wait(seconds)
        stop.set()
        assert all(future.result() > 0 for future in futures)


def test_put_read_delete_and_evict_at_once(chunks: list[SampleChunk]) -> None:
    # Room for about half of the chunks, so that puts evict all the time.
    node = StorageNode("node-0", Arena(12 * len(chunks[0].data), 4 << 10))
    read_bytes = 0

    def write(generator: random.Random) -> None:
        chunk = generator.choice(chunks)
        try:
            pending = node.begin_put(chunk.chunk_id, chunk.encoding, len(chunk.data))
        except ArenaFullError:
            return
        if pending is None:
            return
        for start in range(0, len(chunk.data), 7000):
            pending.write(memoryview(chunk.data)[start : start + 7000])
        if generator.random() < 0.2:
            pending.revoke()
        else:
            pending.commit()

    def read(generator: random.Random) -> None:
        nonlocal read_bytes
        chunk = generator.choice(chunks)
        first = generator.randrange(4)
        try:
            with node.open(chunk.chunk_id, chunk.encoding) as reader:
                data = b"".join(view for piece in reader.pieces(first, 4, 3000) for view in piece)
        except ChunkNotFoundError:
            return
        assert data == chunk.frames(first, 4)
        read_bytes += len(data)

    def leased_read(generator: random.Random) -> None:
        wanted = generator.sample(chunks, 3)
        result = node.lookup(
            LookupRequest([chunk.chunk_id for chunk in wanted], ["exact-zstd"], lease_s=0.02)
        )
        for chunk, answer in zip(wanted, result.answers, strict=True):
            if answer.encoding is not None:
                assert answer.header == chunk.data[: chunk.header.header_bytes]
        read(generator)
        if result.lease_id is not None and generator.random() < 0.5:
            node.release_lease(result.lease_id)

    def delete(generator: random.Random) -> None:
        node.delete([generator.choice(chunks).chunk_id])
        time.sleep(0.002)

    def check(generator: random.Random) -> None:
        node.check_integrity()
        time.sleep(0.001)

    run_for(RUN_S, write, write, read, read, leased_read, delete, check)
    node.check_integrity()
    counters = node.stats().counters
    assert counters["evictions"] > 0
    assert counters["deletes"] > 0
    assert counters["bytes_out"] >= read_bytes > 0
    time.sleep(0.03)
    node.delete([chunk.chunk_id for chunk in chunks])
    assert (node.stats().chunks, node.stats().bytes_used, node.stats().leases) == (0, 0, 0)


def test_of_many_puts_of_one_chunk_exactly_one_is_stored(chunks: list[SampleChunk]) -> None:
    node = StorageNode("node-0", Arena(200 * len(chunks[0].data), 4 << 10))
    barrier = threading.Barrier(8)

    def put_all(_: int) -> int:
        stored = 0
        for chunk in chunks:
            barrier.wait()
            pending = node.begin_put(chunk.chunk_id, chunk.encoding, len(chunk.data))
            if pending is not None:
                pending.write(chunk.data)
                stored += pending.commit()
        return stored

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(put_all, range(8))) == CHUNKS
    node.check_integrity()
    stats = node.stats()
    assert (stats.chunks, stats.counters["puts"]) == (CHUNKS, CHUNKS)
    assert stats.bytes_used == sum(-(-len(chunk.data) // 4096) * 4096 for chunk in chunks)
