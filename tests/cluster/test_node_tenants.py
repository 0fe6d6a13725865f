"""Chunks of one text that several tenants put: what one says of it leaves the chunks and the quota of another alone."""

from collections.abc import Sequence
from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore_cluster.arena import Arena
from kvstore_cluster.lookup import LookupRequest
from kvstore_cluster.node import StorageNode
from kvstore_cluster.put import PutOptions
from kvstore_codec.errors import OverQuotaError, StorageError, TextTooLongError
from tests.sample_chunk import SampleChunk, sample_chunk

BLOCK = 4 << 10
CHUNKS = [sample_chunk(content=number) for number in range(24)]
SIZE_BYTES = max(len(chunk.data) for chunk in CHUNKS)


def new_node(**limits: int) -> StorageNode:
    node = StorageNode("node-0", Arena(8 << 20, BLOCK))
    node.set_quotas({tenant: chunks * SIZE_BYTES for tenant, chunks in limits.items()})
    return node


def put(
    node: StorageNode, chunk: SampleChunk, tenant: str, number: int = 0, behind: Sequence[SampleChunk] = ()
) -> bool:
    """Whether it was stored anew."""
    options = PutOptions(tenant=tenant, number=number, behind=tuple(other.chunk_id for other in behind))
    pending = node.begin_put(chunk.chunk_id, chunk.encoding, len(chunk.data), options=options)
    if pending is None:
        return False
    pending.write(chunk.data)
    return pending.commit()


def stored(node: StorageNode, tenant: str) -> list[SampleChunk]:
    held = {variant.chunk_id for variant in node.list(tenant=tenant)[0]}
    return [chunk for chunk in CHUNKS if chunk.chunk_id in held]


@pytest.mark.parametrize("limits", [{"b": 9}, {"a": 9}, {"a": 9, "b": 9}], ids=str)
def test_a_chunk_put_again_by_another_tenant_stays_in_its_own_queue(limits: dict[str, int]) -> None:
    node = new_node(**limits)
    first, second = CHUNKS[:2]
    assert put(node, second, "b", 5)
    assert put(node, first, "a")
    assert not put(node, second, "a", 5, [first])
    node.check_integrity()
    assert node.delete([second.chunk_id]) == 1
    node.check_integrity()


def test_a_tenant_beyond_its_quota_takes_nothing_from_another() -> None:
    node = new_node(a=4, b=20)
    first, theirs, own = CHUNKS[0], CHUNKS[1:11], CHUNKS[11:20]
    assert put(node, first, "a")
    for number, chunk in enumerate(theirs):
        assert put(node, chunk, "b", number + 1)
    for number, chunk in enumerate(theirs):
        assert not put(node, chunk, "a", number + 1, [first])
    for chunk in own:
        assert put(node, chunk, "a")
    assert stored(node, "b") == theirs
    assert stored(node, "a") == own[-4:]
    node.check_integrity()


@settings(max_examples=40, deadline=None)
@given(puts=st.lists(st.tuples(st.integers(0, 7), st.sampled_from("abc")), max_size=40))
def test_tenants_that_put_one_text_keep_their_quotas(puts: list[tuple[int, str]]) -> None:
    node = new_node(a=3, b=5)
    for number, tenant in puts:
        with suppress(OverQuotaError, TextTooLongError):
            put(node, CHUNKS[number], tenant, number, CHUNKS[:number][::-1])
        node.check_integrity()


def test_the_check_sees_a_queue_that_names_other_chunks() -> None:
    node = new_node(b=9)
    assert put(node, CHUNKS[0], "b")
    node.check_integrity()
    node._catalog.quotas._oldest_first["b"].remove(0)
    with pytest.raises(StorageError, match="queue of tenant 'b'"):
        node.check_integrity()


def test_a_report_of_attention_leaves_the_chunks_of_another_tenant_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    node = new_node()
    own, theirs = CHUNKS[:2]
    assert put(node, own, "a")
    assert put(node, theirs, "b")
    heard: list[float] = []
    monkeypatch.setattr(node._catalog, "report", lambda _, score: heard.append(score))
    node.report([own.chunk_id, theirs.chunk_id], [0.25, 0.75], "a")
    assert heard == [0.25]


def test_tiny_chunks_of_others_do_not_displace_what_was_just_stored() -> None:
    """A tiny chunk takes a whole block of memory, too, so the cost that it saves is not that of a few bytes."""
    node = StorageNode("node-0", Arena(12 * 16 << 10, 16 << 10))
    tiny = [sample_chunk(100 + number, frame_bytes=10) for number in range(12 + 12 + 4)]
    for chunk in tiny[:12]:
        put(node, chunk, "b")
    for chunk in tiny[:12]:  # used again, so that the policy expects chunks to be used after a while
        node.lookup(LookupRequest([chunk.chunk_id], [chunk.encoding]))
    for chunk in tiny[12:24]:
        put(node, chunk, "b")
    put(node, CHUNKS[0], "a")
    for chunk in tiny[24:]:
        put(node, chunk, "b")
    assert stored(node, "a") == [CHUNKS[0]]
