"""With credentials, a subscriber gets the events of its own tenant, and nobody reads them on the way."""

import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
import zmq
from pydantic import SecretStr

from kvstore_api.kv_events import END, decode_sequence, encode_sequence, topic_of
from kvstore_api.v1 import kvstore_pb2 as pb
from kvstore_api.v1 import kvstore_pb2_grpc as rpc
from kvstore_client.connector import Connector
from kvstore_client.kv_events import EventSubscriber
from kvstore_client.settings import SecuritySettings
from kvstore_codec.errors import NodeUnavailableError
from kvstore_service.identity import Credential, Scope, new_token
from kvstore_service.identity.credential import token_digest
from kvstore_service.identity.file import changing
from kvstore_service.security import Security
from kvstore_service.settings import settings_of
from tests.cluster.disk_node import put
from tests.service.events.publishing import PublishingCluster, follow, publishing
from tests.service.events.test_router import CHUNKS


class Secured:
    def __init__(self, folder: Path) -> None:
        self.file = folder / "credentials.json"
        with changing(self.file):
            pass
        self.security = Security.of_cluster(settings_of(credentials=self.file))
        self.cluster: PublishingCluster

    def token(self, tenant: str | None) -> str:
        made_id, token = new_token()
        with changing(self.file) as known:
            known.append(Credential(made_id, "router", tenant, frozenset({Scope.DATA}), token_digest(token)))
        self.refresh()
        return token

    def revoke(self, token: str) -> None:
        with changing(self.file) as known:
            known[:] = [one for one in known if one.token_digest != token_digest(token)]
        self.refresh()

    def refresh(self) -> None:
        file = self.cluster.front._access._file
        assert file is not None
        file.refresh()

    def router(self, token: str, tenant: str = "", silence_s: float = 15.0) -> EventSubscriber:
        connector = Connector(SecuritySettings(token=SecretStr(token)))
        return EventSubscriber(self.cluster.address, tenant=tenant, connector=connector, silence_s=silence_s)


@pytest.fixture
def secured(tmp_path: Path) -> Iterator[Secured]:
    secured = Secured(tmp_path)
    with publishing(tmp_path, security=secured.security) as cluster:
        secured.cluster = cluster
        node = cluster.start_node("one")
        for number, tenant in enumerate(("a", "b", "b")):
            put(node, CHUNKS[number], tenant=tenant)
        yield secured


def test_a_credential_gets_the_events_of_its_tenant(secured: Secured) -> None:
    with secured.router(secured.token("a")) as a, secured.router(secured.token(None), tenant="b") as every:
        follow(a, lambda: secured.cluster.stored("a"))
        follow(every, lambda: secured.cluster.stored("b"))
        assert (len(a.blocks.tiers), len(every.blocks.tiers)) == (1, 2)
        for number in range(10, 20):
            put(secured.cluster.nodes["one"], CHUNKS[number], tenant="b")
        follow(every, lambda: secured.cluster.stored("b"))
        for _ in range(5):
            assert a.poll(0.05) == []


def test_nobody_gets_events_without_a_credential_or_of_another_tenant(secured: Secured) -> None:
    with pytest.raises(NodeUnavailableError, match="needs a credential"):
        secured.router("")
    with pytest.raises(NodeUnavailableError, match="another tenant"):
        secured.router(secured.token("a"), tenant="b")
    with grpc.insecure_channel(secured.cluster.address) as channel:
        call = rpc.CoordinatorStub(channel).Events
        metadata = [("authorization", f"Bearer {secured.token('a')}")]
        for key in (b"", b"short"):
            with pytest.raises(grpc.RpcError, match="curve_key must have 32 bytes"):
                call(pb.EventsRequest(curve_key=key), metadata=metadata)
        call(pb.EventsRequest(curve_key=b"k" * 32), metadata=metadata)
        with pytest.raises(grpc.RpcError, match="another caller has this curve_key"):
            call(
                pb.EventsRequest(curve_key=b"k" * 32),
                metadata=[("authorization", f"Bearer {secured.token('b')}")],
            )


def test_a_subscriber_that_asks_for_everything_gets_only_its_own(secured: Secured) -> None:
    """A client that is not ours: known by its key, it subscribes to every topic and asks for another tenant's."""
    with secured.router(secured.token("a")) as a:
        follow(a, lambda: secured.cluster.stored("a"))
        everything, replay = a._socket(zmq.SUB), a._socket(zmq.DEALER)
        for topic in (b"", b"kv@", topic_of("b")):
            everything.subscribe(topic)
        everything.connect(f"tcp://{a._where.endpoint}")
        replay.connect(f"tcp://{a._where.replay_endpoint}")
        for topic in (topic_of("b"), topic_of("")):
            replay.send_multipart([b"", encode_sequence(0), topic])
        replay.send_multipart([b"", encode_sequence(0), topic_of("a")])
        time.sleep(0.2)
        put(secured.cluster.nodes["one"], CHUNKS[7], tenant="b")
        put(secured.cluster.nodes["one"], CHUNKS[8], tenant="a")
        follow(a, lambda: secured.cluster.stored("a"))
        topics = []
        while replay.poll(2000):
            frames = replay.recv_multipart()
            if decode_sequence(frames[2]) == END:
                break
            topics.append(frames[1])
        assert set(topics) == {topic_of("a")}
        assert not everything.poll(200)


def test_plain_sockets_and_unknown_keys_get_nothing(secured: Secured) -> None:
    address = f"tcp://{secured.cluster.events}"
    with secured.router(secured.token("b")) as b, zmq.Context() as context:
        follow(b, lambda: secured.cluster.stored("b"))
        plain, unknown = context.socket(zmq.SUB), context.socket(zmq.SUB)
        unknown.curve_serverkey = zmq.utils.z85.encode(b._where.server_key)
        unknown.curve_publickey, unknown.curve_secretkey = zmq.curve_keypair()
        for made in (plain, unknown):
            made.setsockopt(zmq.LINGER, 0)
            made.subscribe(topic_of("b"))
            made.connect(address)
        time.sleep(0.2)
        put(secured.cluster.nodes["one"], CHUNKS[9], tenant="b")
        follow(b, lambda: secured.cluster.stored("b"))
        assert not plain.poll(100)
        assert not unknown.poll(100)
        plain.close()
        unknown.close()


def test_a_revoked_credential_ends_its_subscription_and_no_other(secured: Secured) -> None:
    token = secured.token("a")
    with secured.router(token) as a, secured.router(secured.token("b"), silence_s=0.5) as b:
        follow(a, lambda: secured.cluster.stored("a"))
        follow(b, lambda: secured.cluster.stored("b"))
        secured.revoke(token)
        publisher = secured.cluster.front._publisher
        assert publisher is not None
        deadline_s = time.monotonic() + 10
        while publisher._keys is None or len(publisher._keys._callers) > 1:
            assert time.monotonic() < deadline_s
            time.sleep(0.02)
        for tenant in ("a", "b"):
            put(secured.cluster.nodes["one"], CHUNKS[11 + (tenant == "b")], tenant=tenant)
        follow(b, lambda: secured.cluster.stored("b"))
        for _ in range(5):
            assert a.poll(0.05) == []


def test_a_restarted_coordinator_is_found_again(secured: Secured) -> None:
    with secured.router(secured.token("b"), silence_s=0.5) as b:
        follow(b, lambda: secured.cluster.stored("b"))
        secured.cluster.restart_coordinator()
        put(secured.cluster.nodes["one"], CHUNKS[9], tenant="b")
        follow(b, lambda: secured.cluster.stored("b"))
