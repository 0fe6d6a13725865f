"""Calibrations reach a worker whole or not at all, once, in time, and whatever lies in its cache."""

import random
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest
from blake3 import blake3

from kvstore_api.v1 import kvstore_pb2 as pb
from kvstore_bench.shaping import ShapedLink
from kvstore_client import ClientSettings, KVStoreClient, connect
from kvstore_codec.errors import PublishError
from kvstore_service.grpc_server import GrpcServer, unary
from kvstore_service.listen import Address
from tests.client.conftest import ServedCluster

MODEL = b"m" * 32
DATA = random.Random(1).randbytes((3 << 20) + 7)
DIGEST = blake3(DATA).digest()


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def client(cluster: ServedCluster, cache: Path) -> Iterator[KVStoreClient]:
    with connect(cluster.address, cache_dir=cache, retry_after_s=0.0) as client:
        yield client


def cached_file(cache: Path) -> Path:
    return cache / "calibrations" / f"{DIGEST.hex()}.kvcal"


def misses(client: KVStoreClient) -> set[str]:
    return {
        name.removeprefix("miss_")
        for name in client.metrics.snapshot()
        if name.startswith("miss_calibration")
    }


def test_published_found_loaded(client: KVStoreClient) -> None:
    assert client.calibrations.find(MODEL) is None
    assert client.calibrations.publish(DATA, MODEL) == DIGEST
    assert client.calibrations.find(MODEL) == DIGEST
    assert client.calibrations.load(DIGEST) == DATA
    assert misses(client) == set()


def test_a_second_load_comes_from_the_disk_even_without_a_service(
    client: KVStoreClient, cluster: ServedCluster, cache: Path
) -> None:
    client.calibrations.publish(DATA, MODEL)
    client.calibrations.load(DIGEST)
    cluster.coordinator.stop(0)
    with connect("127.0.0.1:1", cache_dir=cache) as another:
        assert another.calibrations.load(DIGEST) == DATA
    assert client.metrics.snapshot()["bytes_in"] == len(DATA)


@pytest.mark.parametrize("damage", [b"", DATA[:-1], DATA + b"x", bytes([DATA[0] ^ 1]) + DATA[1:]])
def test_a_damaged_cache_file_is_got_again(client: KVStoreClient, cache: Path, damage: bytes) -> None:
    client.calibrations.publish(DATA, MODEL)
    cached_file(cache).parent.mkdir(parents=True)
    cached_file(cache).write_bytes(damage)
    assert client.calibrations.load(DIGEST) == DATA
    assert misses(client) == {"calibration_cache_damaged"}
    assert cached_file(cache).read_bytes() == DATA


def test_a_cache_that_cannot_be_used_costs_only_the_cache(client: KVStoreClient, cache: Path) -> None:
    client.calibrations.publish(DATA, MODEL)
    cache.write_text("not a folder")
    assert client.calibrations.load(DIGEST) == DATA
    assert misses(client) == {"calibration_cache_unreadable", "calibration_cache_unwritable"}


def test_clients_that_share_a_cache_do_not_disturb_each_other(
    client: KVStoreClient, cluster: ServedCluster, cache: Path
) -> None:
    """They share nothing but the folder, as processes would."""
    client.calibrations.publish(DATA, MODEL)

    def work(number: int) -> set[str]:
        with connect(cluster.address, cache_dir=cache) as mine:
            for _ in range(10):
                assert mine.calibrations.load(DIGEST) == DATA
                cached_file(cache).unlink(missing_ok=True)
            assert mine.calibrations.load(DIGEST) == DATA
            return misses(mine)

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(work, range(4))) == [set()] * 4
    client.calibrations.load(DIGEST)
    assert [path.name for path in cached_file(cache).parent.iterdir()] == [f"{DIGEST.hex()}.kvcal"]
    assert cached_file(cache).read_bytes() == DATA


def test_an_unknown_digest_is_none_with_a_reason(client: KVStoreClient) -> None:
    assert client.calibrations.load(DIGEST) is None
    assert misses(client) == {"calibration_rpc_not_found"}


def test_what_failed_is_left_alone_for_a_while_and_nothing_else(cluster: ServedCluster, cache: Path) -> None:
    with connect(cluster.address, cache_dir=cache, retry_after_s=60) as client:
        assert client.calibrations.load(b"d" * 32) is None
        assert client.calibrations.load(b"d" * 32) is None
        assert misses(client) == {"calibration_rpc_not_found", "calibration_paused"}
        client.calibrations.publish(DATA, MODEL)
        assert client.calibrations.load(DIGEST) == DATA


def test_a_service_that_is_away(cache: Path) -> None:
    with connect("127.0.0.1:1", cache_dir=cache) as client:
        assert client.calibrations.find(MODEL) is None
        assert client.calibrations.load(DIGEST) is None
        assert misses(client) == {"calibration_rpc_unavailable"}
        with pytest.raises(PublishError, match=r"not accepted by 127\.0\.0\.1:1: UNAVAILABLE"):
            client.calibrations.publish(DATA, MODEL)


def test_a_slow_link_ends_at_the_deadline(client: KVStoreClient, cluster: ServedCluster, cache: Path) -> None:
    client.calibrations.publish(DATA, MODEL)
    with (
        ShapedLink(cluster.address, bandwidth_bps=0.2e6) as link,  # more than two minutes
        connect(link.address, cache_dir=cache, calibration_timeout_s=0.5) as slow,
    ):
        started = time.monotonic()
        assert slow.calibrations.load(DIGEST) is None
        assert time.monotonic() - started < 60
        assert misses(slow) == {"calibration_rpc_deadline_exceeded"}
        assert not cached_file(cache).exists()


def test_a_closed_client_still_reads_its_cache(cluster: ServedCluster, cache: Path) -> None:
    with connect(cluster.address, cache_dir=cache) as client:
        client.calibrations.publish(DATA, MODEL)
        client.calibrations.load(DIGEST)
    assert client.calibrations.load(DIGEST) == DATA
    assert client.calibrations.find(MODEL) is None
    assert misses(client) == {"calibration_closed"}
    with pytest.raises(PublishError, match="closed"):
        client.calibrations.publish(DATA, MODEL)


def test_publish_says_why_it_was_refused(client: KVStoreClient) -> None:
    with pytest.raises(PublishError, match="INVALID_ARGUMENT: a digest has 32 bytes, not 5"):
        client.calibrations.publish(DATA, b"short")


@contextmanager
def lying_coordinator(pieces: Callable[[], Iterator[bytes]], found: bytes = DIGEST) -> Iterator[str]:
    """A coordinator that answers with what it should not."""

    def get(request: pb.GetCalibrationRequest, context: grpc.ServicerContext) -> Iterator[object]:
        for piece in pieces():
            yield pb.GetCalibrationReply(data=piece)

    def find(request: pb.FindCalibrationRequest, context: grpc.ServicerContext) -> object:
        return pb.FindCalibrationReply(digest=found)

    handlers = {
        "GetCalibration": grpc.unary_stream_rpc_method_handler(
            get,
            request_deserializer=pb.GetCalibrationRequest.FromString,
            response_serializer=pb.GetCalibrationReply.SerializeToString,
        ),
        "FindCalibration": unary(find, pb.FindCalibrationRequest),
    }
    server = GrpcServer(Address("127.0.0.1", 0), "kvstore.v1.Coordinator", handlers)
    yield server.address
    server.stop(0)


@pytest.mark.parametrize("pieces", [[], [DATA[:100]], [DATA[:-1] + bytes([DATA[-1] ^ 1])], [DATA, b"x"]])
def test_bytes_of_another_digest_are_never_handed_out(cache: Path, pieces: list[bytes]) -> None:
    with (
        lying_coordinator(lambda: iter(pieces)) as address,
        connect(address, cache_dir=cache) as client,
    ):
        assert client.calibrations.load(DIGEST) is None
        assert misses(client) == {"calibration_damaged"}
        assert not cached_file(cache).exists()


def test_a_stream_without_end_stops_at_the_limit(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvstore_client.calibrations.MAX_CALIBRATION_BYTES", 4 << 20)

    def endless() -> Iterator[bytes]:
        while True:
            yield DATA

    with lying_coordinator(endless) as address, connect(address, cache_dir=cache) as client:
        assert client.calibrations.load(DIGEST) is None
        assert misses(client) == {"calibration_too_large"}


def test_a_digest_that_is_none_is_not_believed(cache: Path) -> None:
    with (
        lying_coordinator(lambda: iter([]), found=b"../../x") as address,
        connect(address, cache_dir=cache) as client,
    ):
        assert client.calibrations.find(MODEL) is None
        assert misses(client) == {"calibration_protocol"}


def test_the_cache_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/worker")
    monkeypatch.delenv("KVSTORE_CACHE_DIR", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert ClientSettings().cache_dir == Path("/home/worker/.cache/kvstore")
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    assert ClientSettings().cache_dir == Path("/cache/kvstore")
    monkeypatch.setenv("KVSTORE_CACHE_DIR", "")
    assert ClientSettings().cache_dir == Path("/cache/kvstore")
    monkeypatch.setenv("KVSTORE_CACHE_DIR", "/chosen")
    assert ClientSettings().cache_dir == Path("/chosen")
    assert ClientSettings(cache_dir=Path("/given")).cache_dir == Path("/given")
