"""What Ray runs again after a crash of the coordinator, here without Ray: it finds all that was decided."""

import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import grpc
import pytest

from kvstore_api.placement import Member
from kvstore_api.v1 import kvstore_pb2 as pb
from kvstore_api.v1 import kvstore_pb2_grpc as rpc
from kvstore_cluster.actors.coordinator import CoordinatorActor
from kvstore_codec.errors import ConfigurationError
from kvstore_service.grpc_coordinator import serve_coordinator
from kvstore_service.listen import Address
from tests.redis_server import RedisServer
from tests.sample_chunk import sample_chunk

A = Member("a", "127.0.0.1:1")
CHUNK = sample_chunk().chunk_id
REF = pb.ChunkRef(content_id=CHUNK.content_id, prefix_id=CHUNK.prefix_id)
serve = partial(serve_coordinator, address=Address("127.0.0.1", 0))


@pytest.fixture
def redis() -> Iterator[RedisServer]:
    with RedisServer() as server:
        yield server


@pytest.mark.parametrize("in_redis", [False, True])
def test_a_successor_knows_what_was_decided(redis: RedisServer, tmp_path: Path, in_redis: bool) -> None:
    url = redis.url if in_redis else None
    first = CoordinatorActor(tmp_path / "one", serve, replicas=2, redis_url=url)
    told = first.join(A, 1)
    assert (told.membership.members, told.membership.replicas, told.pins) == ((A,), 2, {})
    with grpc.insecure_channel(first.address()) as channel:
        rpc.CoordinatorStub(channel).Pin(pb.PinRequest(chunks=[REF]))
    assert first.join(A, 1, told.version).pins == {"": {CHUNK}}
    first.stop(0)
    # What is in Redis does not need the disk.
    folder = tmp_path / ("another" if in_redis else "one")
    second = CoordinatorActor(folder, serve, replicas=2, redis_url=url)
    told = second.join(A, 2)
    assert (told.membership.members, told.pins) == ((A,), {"": {CHUNK}})
    second.leave("a", 2)
    assert second.membership().members == ()
    second.stop(0)


def test_it_waits_for_redis(redis: RedisServer, tmp_path: Path) -> None:
    redis.kill()
    made: list[CoordinatorActor] = []
    making = threading.Thread(
        target=lambda: made.append(CoordinatorActor(tmp_path, serve, redis_url=redis.url))
    )
    making.start()
    making.join(0.5)
    assert making.is_alive()
    redis.start()
    making.join(15)
    (actor,) = made
    assert actor.join(A, 1).membership.members == (A,)
    actor.stop(0)


def test_a_url_that_is_none_is_not_waited_for(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="write redis://"):
        CoordinatorActor(tmp_path, serve, redis_url="localhost:6379")
