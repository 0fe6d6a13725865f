"""A match that one process finds and another one fetches, from a real node."""

import multiprocessing
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

from kvstore_client import connect
from kvstore_client.new_chunk import NewChunk
from tests.client.chunks import SPEC, ids, random_kv
from tests.client.conftest import ServedCluster, served_cluster
from tests.client.match_scripts import CHUNKS, bring, find
from tests.codec.chunks import features_of, make_calibration

pytestmark = pytest.mark.slow  # each test starts two processes that import PyTorch
SPAWN = multiprocessing.get_context("spawn")
PATIENCE_S = 120


@pytest.fixture(params=["exact-zstd", "high-klt-zstd"])
def encoding(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def served(tmp_path: Path, encoding: str) -> Iterator[ServedCluster]:
    with served_cluster(tmp_path, bulk=True) as cluster:
        calibration = make_calibration(SPEC)
        with connect(cluster.address, cache_dir=tmp_path / "writer", encoding=encoding) as client:
            client.calibrations.publish(calibration.to_bytes(), calibration.model_digest)
            client.prepare(SPEC).result(20)
            chunks = [
                NewChunk(chunk_id, lambda i=index: random_kv(i), features=lambda: features_of(256))  # type: ignore[misc]
                for index, chunk_id in enumerate(ids(CHUNKS))
            ]
            assert client.store.put(SPEC, chunks).result(20) == CHUNKS
        yield cluster
        cluster.check_nothing_is_held()


@contextmanager
def process(target: Callable[..., None], *arguments: Any) -> Iterator[Connection]:
    """Runs the target in a process of its own, which ends by itself; this end of the pipe to it."""
    here, there = SPAWN.Pipe()
    child = SPAWN.Process(target=target, args=(*arguments, there))
    child.start()
    there.close()
    try:
        yield here
        child.join(PATIENCE_S)
        assert child.exitcode == 0
    finally:
        child.kill()
        here.close()


def received(pipe: Connection) -> Any:
    assert pipe.poll(PATIENCE_S)
    return pipe.recv()


def test_what_one_process_finds_another_one_fetches(
    served: ServedCluster, tmp_path: Path, encoding: str
) -> None:
    with process(find, served.address, tmp_path / "a", encoding) as scheduler:
        assert scheduler.poll(PATIENCE_S)
        data = scheduler.recv_bytes()
        assert served.nodes[0].stats().leases == 1
        with process(bring, served.address, tmp_path / "b", encoding) as worker:
            worker.send_bytes(data)
            complete, wrong = received(worker)
        assert complete
        assert wrong == 0 if encoding.startswith("exact") else 0 < wrong < 0.5
        served.check_nothing_is_held()  # the worker has released the lease; the scheduler still lives
        scheduler.send("leave")
    assert served.nodes[0].stats().counters["hits"] == CHUNKS


@pytest.mark.parametrize("encoding", ["exact-zstd"], indirect=True)
def test_who_found_a_match_releases_it_when_nobody_else_does(
    served: ServedCluster, tmp_path: Path, encoding: str
) -> None:
    with process(find, served.address, tmp_path / "a", encoding) as scheduler:
        assert scheduler.poll(PATIENCE_S)
        data = scheduler.recv_bytes()
        with process(bring, served.address, tmp_path / "b", encoding) as worker:
            worker.send_bytes(data[:-9])
            assert received(worker)[0] == "refused"
        assert served.nodes[0].stats().leases == 1
        scheduler.send("release")
    served.check_nothing_is_held()
