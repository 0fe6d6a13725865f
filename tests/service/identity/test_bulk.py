"""Who may call the bulk port of a service with credentials."""

import socket

import pytest

from kvstore_api.frames import HEADER_BYTES, MAX_TOKEN_BYTES, FrameKind, pack_header
from kvstore_api.v1 import kvstore_pb2 as pb
from kvstore_service.identity import Scope
from tests.sample_chunk import sample_chunk
from tests.service.bulk_port import CHUNK, Port, answer, put_frame, read_frame, received, reply
from tests.service.secured import SecuredCluster


def refusal(connected: socket.socket) -> str:
    kind, text = answer(connected)
    assert kind == FrameKind.REFUSED
    return text.decode()


def stored(cluster: SecuredCluster, token: str) -> None:
    with cluster.bulk_connection(token) as connected:
        connected.sendall(put_frame() + CHUNK.data)
        assert reply(connected).status == pb.PUT_STATUS_STORED


def read_status(cluster: SecuredCluster, token: str) -> tuple[int, int, int]:
    """(kind, status, length) of the answer to a read of the chunk."""
    with cluster.bulk_connection(token) as connected:
        connected.sendall(read_frame())
        header = received(connected, HEADER_BYTES)
        return header[1], header[3], int.from_bytes(header[8:], "big")


def test_a_token_opens_the_port_to_its_tenant(cluster: SecuredCluster) -> None:
    ours, theirs = cluster.token("a"), cluster.token("b")
    stored(cluster, ours)
    assert read_status(cluster, ours) == (FrameKind.RANGE, pb.READ_STATUS_OK, len(CHUNK.data))
    assert read_status(cluster, theirs) == (FrameKind.RANGE, pb.READ_STATUS_NOT_FOUND, 0)
    stored(cluster, theirs)
    assert [variant.tenant for variant in cluster.node.list()[0]] == ["a", "b"]


@pytest.mark.parametrize("any_order", [False, True])
def test_a_read_may_not_name_another_tenant(cluster: SecuredCluster, any_order: bool) -> None:
    stored(cluster, cluster.token("b"))
    with cluster.bulk_connection(cluster.token("a")) as connected:
        connected.sendall(read_frame(tenant="b", any_order=any_order))
        assert "another tenant" in refusal(connected)


@pytest.mark.parametrize("request_frame", [read_frame(), put_frame()], ids=["read", "put"])
def test_a_stranger_is_told_what_to_do(cluster: SecuredCluster, request_frame: bytes) -> None:
    with cluster.bulk_connection() as connected:
        connected.sendall(request_frame)
        assert "KVSTORE_TOKEN_FILE" in refusal(connected)
    assert cluster.node.stats().counters["reads"] == 0


def test_a_wrong_token_is_refused_at_once(cluster: SecuredCluster) -> None:
    wrong = cluster.token("a")[:-4] + "0000"
    with cluster.bulk_connection(wrong) as connected:
        text = refusal(connected)
    assert "not valid here" in text
    assert wrong not in text


@pytest.mark.parametrize("scope", [Scope.ADMIN, Scope.NODE, Scope.METRICS])
def test_the_port_is_for_data(cluster: SecuredCluster, scope: Scope) -> None:
    with cluster.bulk_connection(cluster.token(None, scope)) as connected:
        assert "needs a credential with the scope data" in refusal(connected)


def test_a_token_has_a_limit(cluster: SecuredCluster) -> None:
    with cluster.bulk_connection() as connected:
        connected.sendall(pack_header(FrameKind.TOKEN, MAX_TOKEN_BYTES + 1))
        assert "at most" in refusal(connected)


def test_an_open_connection_ends_with_its_credential(cluster: SecuredCluster) -> None:
    token = cluster.token("a")
    with cluster.bulk_connection(token) as connected:
        connected.sendall(put_frame() + CHUNK.data)
        assert reply(connected).status == pb.PUT_STATUS_STORED
        cluster.token("other")  # another change of the file leaves it open
        connected.sendall(put_frame() + CHUNK.data)
        assert reply(connected).status == pb.PUT_STATUS_ALREADY_STORED
        cluster.revoke(token)
        connected.sendall(put_frame() + CHUNK.data)
        assert "was revoked" in refusal(connected)


def test_a_port_without_credentials_ignores_a_token(port: Port) -> None:
    with port.connected() as connected:
        connected.sendall(pack_header(FrameKind.TOKEN, 3) + b"any")
        other = sample_chunk(content=5)
        connected.sendall(put_frame(other) + other.data)
        assert reply(connected).status == pb.PUT_STATUS_STORED
