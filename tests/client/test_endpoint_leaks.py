"""What a client keeps for an address, or for a stream, goes when that is not in use any more."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from kvstore_api.placement import Member
from kvstore_client import KVStoreClient, cluster_view, connect
from kvstore_client.buffers import KVBuffers
from kvstore_client.channels import Channels
from kvstore_client.connector import Connector
from kvstore_client.fetch.base import ReceivedFrames
from kvstore_client.fetch.failover import Failover
from kvstore_client.fetch.fetch_state import FetchState
from kvstore_client.fetch.queue import StageQueue
from kvstore_client.fetch.receive import Receiver
from kvstore_client.match import Match
from kvstore_client.planning import Links
from kvstore_client.timeline import Timeline
from kvstore_codec.errors import NodeUnavailableError
from kvstore_service.bulk_server import serve_bulk
from kvstore_service.grpc_storage import serve_storage
from tests.client.chunks import SPEC, ids
from tests.client.conftest import ServedCluster, served_cluster
from tests.client.test_replicas import put

RESTARTS = 6
IN_USE = 3  # the coordinator, the node, and where it was before


@pytest.fixture
def served(tmp_path: Path) -> Iterator[ServedCluster]:
    with served_cluster(tmp_path, bulk=True) as cluster:
        yield cluster


@pytest.fixture
def client(served: ServedCluster) -> Iterator[KVStoreClient]:
    with connect(served.address, retry_after_s=0.0, lookup_timeout_s=20.0) as client:
        yield client


def restart(cluster: ServedCluster, incarnation: int) -> None:
    """The node comes back on other ports."""
    cluster.stop_storage()
    (node,) = cluster.nodes
    cluster.servers.append(serve_storage(node, host="127.0.0.1"))
    cluster.bulk.append(serve_bulk(node, host="127.0.0.1"))
    server, port = cluster.servers[0].address, cluster.bulk[0].address
    cluster.books.join(Member(node.node_id, server, bulk_endpoint=port), incarnation)


def matched(client: KVStoreClient, chunks: int) -> Match:
    match = client.match(SPEC, ids(chunks))
    assert len(match.chunks) == chunks
    return match


def fetched(client: KVStoreClient, match: Match) -> KVBuffers:
    buffers = client.buffers.acquire(SPEC, match.tokens)
    assert client.fetch(match, buffers, None).wait().complete
    return buffers


def test_nothing_is_kept_of_where_a_node_was(served: ServedCluster, client: KVStoreClient) -> None:
    view = client._view
    assert put(client, ids(1)) == 1
    for incarnation in range(2, 2 + RESTARTS):
        fetched(client, matched(client, 1))
        restart(served, incarnation)
        view._ask(5.0)
    fetched(client, matched(client, 1))
    assert len(view._channels) <= IN_USE
    assert len(client.links._links) <= IN_USE
    served.books.join(Member("another", "127.0.0.1:1"), 1)
    served.books.leave(served.nodes[0].node_id, 1 + RESTARTS)
    view._ask(5.0)
    view._before = None  # a while later
    view._ask(5.0)
    assert not view._transports._bulk


def test_a_call_under_way_ends_before_its_channel(served: ServedCluster, client: KVStoreClient) -> None:
    """Who took the channel before the node went elsewhere may still use it."""
    put(client, ids(1))
    stub = client._view.storage(served.servers[0].address)
    client._view._channels.keep([])
    lookup = cluster_view.pb.LookupRequest(peek=True)
    assert stub.Lookup(lookup, timeout=5.0) is not None


def test_retired_channels_are_closed_in_the_end(served: ServedCluster) -> None:
    channels = Channels(Connector(), {}, longest_call_s=0.0)
    channel = channels.to(served.address)
    channels.keep([])
    channels.keep([])
    assert not channels._retired
    with pytest.raises(ValueError, match="closed"):
        channel.unary_unary("/x")(b"", timeout=1.0)
    channels.close()


def test_pauses_that_ended_long_ago_are_forgotten(
    client: KVStoreClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster_view, "_FORGET_PAUSE_S", 0.0, raising=False)
    for port in range(1, 100):
        client._view.pause(f"127.0.0.1:{port}")
    assert len(client._view._pauses) == 1


def test_a_closed_client_opens_no_channel_and_raises_nothing(client: KVStoreClient) -> None:
    put(client, ids(2))
    fetch_late, release_late = matched(client, 2), matched(client, 2)
    buffers = client.buffers.acquire(SPEC, fetch_late.tokens)
    client.close()
    client.release(release_late)
    report = client.fetch(fetch_late, buffers, None).wait()
    assert set(report.missing.values()) == {"closed"}
    with pytest.raises(NodeUnavailableError, match="closed"):
        client._view.storage("127.0.0.1:1")
    assert len(client._view._channels) == 0
    assert not client._view._transports._bulk


def test_a_fetch_keeps_no_stream_that_it_has_read(client: KVStoreClient) -> None:
    put(client, ids(2))
    match = matched(client, 2)
    member = match.chunks[0].member
    progress = FetchState(match.chunks, layers=SPEC.layers, deadline_s=30, stall_s=30, timeline=Timeline())
    failover = Failover(client._view, Links(), client.settings, match.chunks, progress, replans=False)
    out = StageQueue[ReceivedFrames](1 << 40)
    receiver = Receiver(client._view, failover, progress, out, client.metrics, ahead=True)
    received: list[ReceivedFrames] = []

    def take(frames: ReceivedFrames) -> bool:
        received.append(frames)
        return True

    streams = 0
    while tasks := progress.next_reads(member, 1):
        streams += 1
        assert receiver._read(member, tasks, take, hurried=False) == {}
        assert not progress._end_callbacks
    assert streams == len(received) > 1
    ended: list[str] = []
    with progress.until_end(lambda: ended.append("meanwhile")):
        pass
    with progress.until_end(lambda: ended.append("during")):
        progress.end("cancelled")
    with progress.until_end(lambda: ended.append("afterwards")):
        pass
    assert ended == ["during", "afterwards"]
    client.release(match)
