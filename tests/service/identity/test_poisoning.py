"""What a worker of one tenant stores under the names of another one's chunks changes nothing for the other one."""

from blake3 import blake3

from kvstore_api.v1 import kvstore_pb2 as pb
from kvstore_service.identity import Scope
from tests.sample_chunk import SampleChunk, sample_chunk
from tests.service.secured import SecuredCluster, put_steps, ref

HONEST = sample_chunk(content=1)
POISON = sample_chunk(content=1, frame_bytes=1200)  # the same name, other bytes


def stored(cluster: SecuredCluster, token: str, chunk: SampleChunk, tenant: str = "", **start: object) -> int:
    steps = put_steps(chunk, tenant)
    steps[0].start.MergeFrom(pb.PutStart(**start))
    (reply,) = cluster.nodes(token).Put(iter(steps), timeout=10)
    return reply.status


def read(cluster: SecuredCluster, token: str) -> bytes | None:
    request = pb.ReadRequest(chunks=[ref(HONEST)], encodings=[HONEST.encoding], ranges=[pb.ReadRange()])
    replies = list(cluster.nodes(token).Read(request, timeout=10))
    if replies[0].status == pb.READ_STATUS_NOT_FOUND:
        return None
    return b"".join(reply.data for reply in replies)


def test_a_foreign_worker_cannot_name_a_chunk_of_another_tenant_first(cluster: SecuredCluster) -> None:
    ours, theirs = cluster.token("acme"), cluster.token("rival", Scope.DATA, Scope.ADMIN)
    digest = bytes(32)
    # Whatever it says: under its own tenant, or under the other one's name, which is refused.
    assert stored(cluster, theirs, POISON) == pb.PUT_STATUS_STORED
    assert read(cluster, theirs) == POISON.data
    assert read(cluster, ours) is None
    lookup = pb.LookupRequest(chunks=[ref(HONEST)], encodings=[HONEST.encoding])
    (answer,) = cluster.nodes(ours).Lookup(lookup, timeout=10).answers
    assert (answer.encoding, answer.other_contexts) == ("", 0)
    assert stored(cluster, ours, HONEST) == pb.PUT_STATUS_STORED
    # Nor afterwards, not even with the digest of the header that it wants replaced.
    for refused in ([], [digest], [blake3(HONEST.data[: HONEST.header.header_bytes]).digest()]):
        assert stored(cluster, theirs, POISON, refused=refused) == pb.PUT_STATUS_ALREADY_STORED
        assert read(cluster, ours) == HONEST.data


def test_within_a_tenant_a_put_replaces_only_the_chunk_that_it_names(cluster: SecuredCluster) -> None:
    token = cluster.token("acme")
    assert stored(cluster, token, POISON) == pb.PUT_STATUS_STORED
    assert stored(cluster, token, HONEST) == pb.PUT_STATUS_ALREADY_STORED
    assert stored(cluster, token, HONEST, refused=[bytes(32)]) == pb.PUT_STATUS_ALREADY_STORED
    assert read(cluster, token) == POISON.data
    refused = [bytes(32), blake3(POISON.data[: POISON.header.header_bytes]).digest()]
    assert stored(cluster, token, HONEST, refused=refused) == pb.PUT_STATUS_STORED
    assert read(cluster, token) == HONEST.data
    assert stored(cluster, token, POISON, refused=refused) == pb.PUT_STATUS_ALREADY_STORED
    for malformed in ([b"short"], [bytes(32)] * 5):
        assert stored(cluster, token, HONEST, refused=malformed) == pb.PUT_STATUS_INVALID
