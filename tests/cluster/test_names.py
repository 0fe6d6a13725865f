"""Tenants, encodings and calibrations that no chunk bears any more make room for others."""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvstore_cluster import names
from kvstore_cluster.arena import Arena
from kvstore_cluster.disk import RecordMeta, SegmentStore
from kvstore_cluster.index import ChunkIndex
from kvstore_cluster.lookup import LookupRequest
from kvstore_cluster.names import MOST_CALIBRATIONS, MOST_ENCODINGS, ChunkNames
from kvstore_cluster.node import StorageNode
from kvstore_cluster.put import PutOptions
from kvstore_codec.errors import OverQuotaError, StorageError
from kvstore_codec.identity import ChunkId, ContentId, PrefixId
from tests.sample_chunk import SampleChunk, sample_chunk

MOST_NAMES = 1500
CHUNK = RecordMeta(ChunkId(ContentId(bytes(32)), PrefixId(bytes(32))), "exact-zstd", 1000, 100)


@pytest.fixture(autouse=True)
def fewer_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(names, "MOST_NAMES", MOST_NAMES)


def digest(number: int) -> bytes:
    return number.to_bytes(32, "big")


def add(index: ChunkIndex, meta: RecordMeta) -> int:
    chunk_id = ChunkId(ContentId(os.urandom(32)), PrefixId(os.urandom(32)))
    return index.add(replace(meta, chunk_id=chunk_id))


def drop(index: ChunkIndex, slot: int) -> None:
    index.unlink(slot)
    index.free(slot)


@pytest.mark.parametrize(
    "named",
    [
        lambda number: replace(CHUNK, tenant=str(number)),
        lambda number: replace(CHUNK, calibration=digest(number)),
        lambda number: replace(CHUNK, encoding=f"step0.{number + 1}-zstd"),
    ],
    ids=["tenants", "calibrations", "encodings"],
)
def test_names_that_have_gone_make_room(named: Callable[[int], RecordMeta]) -> None:
    index = ChunkIndex()
    for number in range(MOST_NAMES + 1):
        slot = index.add(named(number))
        assert index.meta(slot) == named(number)
        drop(index, slot)


@pytest.mark.parametrize(
    ("named", "most"),
    [
        (lambda number: replace(CHUNK, calibration=digest(number)), MOST_CALIBRATIONS),
        (lambda number: replace(CHUNK, encoding=f"step0.{number + 1}-zstd"), MOST_ENCODINGS),
    ],
    ids=["calibrations", "encodings"],
)
def test_one_tenant_leaves_room_for_the_others(named: Callable[[int], RecordMeta], most: int) -> None:
    index = ChunkIndex()
    slots = [add(index, named(number)) for number in range(most)]
    with pytest.raises(OverQuotaError, match=f"at most {most} different"):
        add(index, named(most))
    add(index, named(0))
    add(index, replace(named(most), tenant="another"))
    drop(index, slots[1])
    add(index, named(most))


def test_all_tenants_together_are_bounded_and_a_refused_one_takes_nothing() -> None:
    index = ChunkIndex()
    slots = [add(index, replace(CHUNK, tenant=str(number))) for number in range(MOST_NAMES)]
    for _ in range(2):
        with pytest.raises(StorageError, match="different tenants"):
            add(index, replace(CHUNK, tenant="one more", calibration=digest(1)))
    drop(index, slots[0])
    add(index, replace(CHUNK, tenant="one more", calibration=digest(1)))


few = st.tuples(st.sampled_from("abc"), st.sampled_from([None, b"1", b"2", b"3"]), st.sampled_from("xyz"))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.one_of(few, st.integers(0, 20)), max_size=60))
def test_numbers_mean_what_was_acquired_in_whatever_order_it_goes(
    steps: list[tuple[str, bytes, str] | int],
) -> None:
    table = ChunkNames()
    held = []
    for step in steps:
        if isinstance(step, tuple):
            held.append((table.acquire(*step), step))
        elif held:
            table.release(held.pop(step % len(held))[0])
        for description, (encoding, calibration, tenant) in held:
            assert table.encodings[description.encoding] == encoding
            assert table.calibrations[description.calibration] == calibration
            assert table.tenants[description.tenant] == tenant
        assert set(table.all_encodings) == {description.encoding for description, _ in held}
        assert [table.encoding_number(name) is not None for name in "abc"] == [
            any(name == named for _, (named, _, _) in held) for name in "abc"
        ]


def calibrated(number: int) -> SampleChunk:
    return sample_chunk(content=number, encoding="medium-klt-pco", frame_bytes=10, calibration=digest(number))


def put(node: StorageNode, chunk: SampleChunk, options: PutOptions = PutOptions()) -> bool:  # noqa: B008
    pending = node.begin_put(chunk.chunk_id, chunk.encoding, len(chunk.data), options=options)
    assert pending is not None
    pending.write(memoryview(chunk.data))
    return pending.commit()


def test_a_put_with_one_calibration_too_many_is_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(names, "MOST_CALIBRATIONS", 2)
    node = StorageNode("node-0", Arena(1 << 20, 4 << 10))
    assert put(node, calibrated(0))
    assert put(node, calibrated(1))
    used = node.stats().bytes_used
    with pytest.raises(OverQuotaError, match="2 different calibrations"):
        put(node, calibrated(2))
    assert node.stats().bytes_used == used
    assert put(node, calibrated(2), PutOptions(tenant="another"))
    node.delete([calibrated(0).chunk_id])
    assert put(node, calibrated(3))
    node.check_integrity()


def test_a_node_starts_with_more_calibrations_on_its_disk_than_it_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start() -> StorageNode:
        return StorageNode("node-0", Arena(1 << 20, 4 << 10), store=SegmentStore(tmp_path, 8 << 20))

    node = start()
    for number in range(4):
        assert put(node, calibrated(number))
    node.close()
    monkeypatch.setattr(names, "MOST_CALIBRATIONS", 2)
    node = start()
    assert node.stats().chunks == 2
    assert node.stats().gauges["disk_chunks"] == 2
    found = [
        node.lookup(LookupRequest([calibrated(number).chunk_id], ["medium-klt-pco"])).answers[0]
        for number in range(4)
    ]
    assert sum(answer.encoding is not None for answer in found) == 2
    node.check_integrity()
    node.close()


def test_a_name_stays_known_while_its_put_is_on_its_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another one that comes meanwhile does not take its room."""
    monkeypatch.setattr(names, "MOST_CALIBRATIONS", 1)
    store = SegmentStore(tmp_path, 8 << 20)
    node = StorageNode("node-0", Arena(1 << 20, 4 << 10), store=store)
    append = store.append

    def slow_append(*arguments, **options):
        monkeypatch.setattr(store, "append", append)
        with pytest.raises(OverQuotaError):
            put(node, calibrated(1))
        return append(*arguments, **options)

    monkeypatch.setattr(store, "append", slow_append)
    assert put(node, calibrated(0))
    assert [variant.calibration for variant in node.list()[0]] == [digest(0)]
    node.check_integrity()
    node.close()
