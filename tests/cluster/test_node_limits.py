"""Limits of what stays on a storage node with a disk: TTLs, quotas and leases."""

import pytest

from kvstore_cluster.lookup import LookupRequest
from kvstore_cluster.put import PutOptions
from kvstore_codec.errors import (
    ChunkNotFoundError,
    OverQuotaError,
    PutStateError,
)
from tests.clock import Clock
from tests.cluster.disk_node import Opener, chunk_of, put, read, stored


def test_chunks_expire(opened: Opener, clock: Clock) -> None:
    node = opened()
    short, long = chunk_of(0), chunk_of(1)
    put(node, short, ttl_s=10.0)
    put(node, long, ttl_s=1000.0)
    clock.now_s += 20
    assert (stored(node, short), stored(node, long)) == (False, True)
    with pytest.raises(ChunkNotFoundError):
        read(node, short)
    assert node.stats().chunks == 2
    node.maintain()
    assert (node.stats().chunks, node.stats().counters["expired"]) == (1, 1)
    assert put(node, short, ttl_s=10.0)
    clock.now_s -= 10_000  # the clock goes back: chunks live longer, none is lost
    assert stored(node, short)


def test_an_expired_chunk_can_be_put_again_at_once(opened: Opener, clock: Clock) -> None:
    node = opened()
    chunk = chunk_of(0)
    put(node, chunk, ttl_s=10.0)
    clock.now_s += 20
    assert put(node, chunk)
    assert read(node, chunk) == chunk.data
    assert node.stats().chunks == 1


def test_a_quota_evicts_what_its_tenant_used_least_lately(opened: Opener) -> None:
    node = opened()
    size_bytes = len(chunk_of(0).data)
    other = chunk_of(500)
    put(node, other, tenant="other")
    put(node, chunk_of(0), tenant="acme")
    node.set_quotas({"acme": 4 * 100_000})
    for number in range(1, 20):
        put(node, chunk_of(number), tenant="acme")
    mine, _ = node.list(tenant="acme")
    assert sum(variant.size_bytes for variant in mine) <= 400_000
    assert stored(node, other)
    assert stored(node, chunk_of(19))
    lease = node.lookup(LookupRequest([variant.chunk_id for variant in mine], ["exact-zstd"], lease_s=60.0))
    with pytest.raises(OverQuotaError, match="acme"):
        put(node, chunk_of(20), tenant="acme")
    assert lease.lease_id is not None
    node.release_lease(lease.lease_id)
    assert put(node, chunk_of(20), tenant="acme")
    assert size_bytes


def test_a_tenants_name_has_a_limit(opened: Opener) -> None:
    node = opened()
    with pytest.raises(PutStateError, match="more than 255 bytes"):
        put(node, chunk_of(0), tenant="x" * 256)
    assert put(node, chunk_of(0), tenant="x" * 255)
    assert node.stats().counters["put_rejected"] == 1


def test_a_chunk_put_to_stay_outlives_the_ttl_of_before(opened: Opener, clock: Clock) -> None:
    node = opened()
    chunk = chunk_of(0)
    put(node, chunk, ttl_s=5.0)
    assert not put(node, chunk, ttl_s=6.0)  # about as long
    assert put(node, chunk)
    clock.now_s += 100
    assert stored(node, chunk)


def test_puts_under_way_count_against_a_quota_and_a_refused_put_evicts_nothing(opened: Opener) -> None:
    node = opened()
    chunks = [chunk_of(number) for number in range(5)]
    node.set_quotas({"acme": 3 * 100_000})
    options = PutOptions(tenant="acme")
    pending = [
        node.begin_put(chunk.chunk_id, chunk.encoding, 100_000, options=options) for chunk in chunks[:3]
    ]
    with pytest.raises(OverQuotaError):
        node.begin_put(chunks[3].chunk_id, chunks[3].encoding, 100_000, options=options)
    for put_ in pending:
        assert put_ is not None
        put_.revoke()
    assert put(node, chunks[0], tenant="acme")
    with pytest.raises(OverQuotaError):
        node.begin_put(chunks[1].chunk_id, chunks[1].encoding, 400_000, options=options)
    assert stored(node, chunks[0])


def test_a_lease_ends_with_its_chunk(opened: Opener) -> None:
    node = opened()
    chunk = chunk_of(0)
    put(node, chunk)
    lease = node.lookup(LookupRequest([chunk.chunk_id], [chunk.encoding], lease_s=60.0))
    node.delete([chunk.chunk_id])
    node.set_quotas({"acme": 100_000})
    put(node, chunk_of(1), tenant="acme")
    assert put(node, chunk_of(2), tenant="acme")  # evicts the other: nobody has it leased
    assert lease.lease_id is not None
    assert node.release_lease(lease.lease_id)
    node.maintain()
    node.check_integrity()
