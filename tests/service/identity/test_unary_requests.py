"""Calls whose request does not come keep nobody out, whoever makes them."""

import contextlib
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from kvstore_api.v1 import kvstore_pb2 as pb
from kvstore_client.request_id import METADATA_KEY
from kvstore_cluster.node import StorageNode
from kvstore_service import grpc_server, stalled_streams, unary_requests
from kvstore_service.identity import Scope
from tests.half_calls import half_calls
from tests.service.conftest import ServedNode
from tests.service.secured import SecuredCluster, code_of
from tests.service.storage_calls import wait_until

OK, BUSY = grpc.StatusCode.OK, grpc.StatusCode.RESOURCE_EXHAUSTED
CHECK, LOOKUP, READ = "/grpc.health.v1.Health/Check", "/kvstore.v1.Storage/Lookup", "/kvstore.v1.Storage/Read"
MANY = 40
ELSEWHERE = "127.0.0.2"
"""Another network than that of the tests' other clients."""
TIMEOUT_S = 20


@pytest.fixture(autouse=True)
def _few_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grpc_server, "_THREADS", 16)
    monkeypatch.setattr(unary_requests, "MAX_RECEIVING", 4)
    monkeypatch.setattr(unary_requests, "MAX_RECEIVING_OF_STRANGERS", 4)


def checked(cluster: SecuredCluster, address: str = "") -> grpc.StatusCode:
    stub = health_pb2_grpc.HealthStub(cluster.channel(address or cluster.storage.address))
    return code_of(stub.Check.future(health_pb2.HealthCheckRequest(), timeout=TIMEOUT_S))


def looked_up(cluster: SecuredCluster, token: str) -> grpc.StatusCode:
    return code_of(cluster.nodes(token).Lookup.future(pb.LookupRequest(), timeout=TIMEOUT_S))


def received(server: object) -> unary_requests.UnaryRequests:
    """The part of a server that receives requests."""
    pipeline = server._server._state.interceptor_pipeline  # type: ignore[attr-defined]
    return next(one for one in pipeline.interceptors if isinstance(one, unary_requests.UnaryRequests))


def test_strangers_without_a_request_keep_nobody_out(cluster: SecuredCluster) -> None:
    token = cluster.token("acme")
    for address in (cluster.storage.address, cluster.front.address):
        with half_calls(address, CHECK, MANY, source=ELSEWHERE):
            assert checked(cluster, address) is OK
            assert looked_up(cluster, token) is OK
            assert (
                code_of(cluster.coordinators(token).Membership.future(pb.MembershipRequest(), timeout=9))
                is OK
            )


def test_strangers_hold_no_thread_of_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grpc_server, "_THREADS", 2)
    cluster = SecuredCluster(tmp_path)
    room = received(cluster.storage)._strangers._room
    with half_calls(cluster.storage.address, CHECK, MANY, source=ELSEWHERE):
        wait_until(lambda: len(room) == unary_requests.MAX_RECEIVING_OF_STRANGERS)
        assert looked_up(cluster, cluster.token("acme")) is OK
    cluster.close()


@pytest.mark.parametrize("method", [LOOKUP, READ])
def test_a_tenant_without_requests_keeps_nobody_out(cluster: SecuredCluster, method: str) -> None:
    greedy, token = cluster.token("greedy"), cluster.token("acme")
    with half_calls(cluster.storage.address, method, MANY, greedy):
        room = received(cluster.storage)._members._room
        wait_until(lambda: len(room) == unary_requests.MAX_RECEIVING)
        assert looked_up(cluster, token) is OK
        assert checked(cluster) is OK
    wait_until(lambda: not len(room))


def test_without_credentials_half_calls_keep_nobody_out(storage: ServedNode) -> None:
    for method in (CHECK, LOOKUP, READ):
        with half_calls(storage.server.address, method, MANY, source=ELSEWHERE):
            assert storage.stub.Stats(pb.StatsRequest(), timeout=TIMEOUT_S).node_id == "node-0"


def test_a_request_has_a_time_to_come(storage: ServedNode, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unary_requests, "REQUEST_S", 0.1)
    monkeypatch.setattr(stalled_streams, "_PERIOD_S", 0.05)
    rooms = (received(storage.server)._members._room, received(storage.server)._strangers._room)
    for method in (CHECK, LOOKUP, READ):
        with half_calls(storage.server.address, method, 1) as connected:
            connected.settimeout(TIMEOUT_S)
            cancelled = bytes([0, 0, 4, 3, 0, 0, 0, 0, 1])  # RST_STREAM of the call
            answer = b""
            while cancelled not in answer:
                more = connected.recv(1 << 16)
                assert more, method
                answer += more
        wait_until(lambda: not any(map(len, rooms)))


def test_a_call_that_ends_without_a_request_is_refused(storage: ServedNode) -> None:
    call = storage.channel.stream_unary(LOOKUP).future(iter(()), timeout=TIMEOUT_S)
    assert code_of(call) is grpc.StatusCode.INVALID_ARGUMENT


def test_a_dashboard_without_requests_keeps_no_operator_out(
    cluster: SecuredCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unary_requests, "MAX_UNARY_OF_OPERATORS", 1)
    dashboard = cluster.token(None, Scope.METRICS)
    with half_calls(cluster.storage.address, "/kvstore.v1.Storage/Stats", MANY, dashboard):
        room = received(cluster.storage)._members._room
        wait_until(lambda: len(room) == unary_requests.MAX_RECEIVING)
        admin = cluster.nodes(cluster.token(None, Scope.ADMIN))
        assert code_of(admin.Stats.future(pb.StatsRequest(), timeout=TIMEOUT_S)) is OK


@contextlib.contextmanager
def slow_lookups(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], int]]:
    """Lookups last until the end of the block. Yields how many are in progress."""
    go_on, begun = threading.Event(), threading.Semaphore(0)
    fast = StorageNode.lookup

    def slow(*given: object, **named: object) -> object:
        begun.release()
        go_on.wait(60)
        return fast(*given, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(StorageNode, "lookup", slow)
    try:
        yield lambda: begun._value
    finally:
        go_on.set()


def test_one_tenant_leaves_calls_for_others_and_all_leave_some_for_operators(
    cluster: SecuredCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unary_requests, "MAX_UNARY", 3)
    monkeypatch.setattr(unary_requests, "MAX_UNARY_OF_TENANT", 2)
    tokens = {tenant: cluster.token(tenant) for tenant in ("greedy", "acme", "late")}
    stubs = {tenant: cluster.nodes(token) for tenant, token in tokens.items()}
    admin = cluster.nodes(cluster.token(None, Scope.ADMIN))
    with slow_lookups(monkeypatch) as in_progress:
        calls = [stubs[name].Lookup.future(pb.LookupRequest()) for name in ("greedy", "greedy", "acme")]
        wait_until(lambda: in_progress() == 3)
        assert code_of(stubs["late"].Stats.future(pb.StatsRequest())) is grpc.StatusCode.PERMISSION_DENIED
        for tenant in tokens:
            refused = stubs[tenant].Delete.future(pb.DeleteRequest(), timeout=TIMEOUT_S)
            assert code_of(refused) is BUSY
        assert "2 calls of this tenant" in stubs["greedy"].Lookup.future(pb.LookupRequest()).details()
        assert code_of(admin.Stats.future(pb.StatsRequest(), timeout=TIMEOUT_S)) is OK
        assert checked(cluster) is OK
    assert [code_of(call) for call in calls] == [OK] * 3
    assert looked_up(cluster, tokens["late"]) is OK


def test_a_watch_of_health_holds_no_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grpc_server, "_THREADS", 2)
    cluster = SecuredCluster(tmp_path)
    token = cluster.token("acme")
    watch = health_pb2_grpc.HealthStub(cluster.channel(cluster.storage.address, token)).Watch
    for metadata in ((), ((METADATA_KEY, "one"),)):
        watches = [watch(health_pb2.HealthCheckRequest(), metadata=metadata) for _ in range(3)]
        assert [next(one).status for one in watches] == [health_pb2.HealthCheckResponse.SERVING] * 3
        assert looked_up(cluster, token) is OK
        for one in watches:
            one.cancel()
    cluster.close()
