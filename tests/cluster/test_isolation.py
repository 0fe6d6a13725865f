"""A node that keeps tenants apart is, for each tenant, a node of its own."""

import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore_api.v1 import kvstore_pb2 as pb
from kvstore_cluster.arena import Arena
from kvstore_cluster.disk import SegmentStore
from kvstore_cluster.lookup import LookupRequest
from kvstore_cluster.node import StorageNode
from kvstore_cluster.put import PutOptions
from kvstore_cluster.scrub import scrub
from kvstore_codec.errors import ChunkNotFoundError
from tests.sample_chunk import SampleChunk, sample_chunk

OURS = sample_chunk(content=1)
THEIRS = sample_chunk(content=1, frame_bytes=1200)  # the same name, other bytes
ELSEWHERE = sample_chunk(content=1, context=1)


def new_node(folder: Path | None = None, *, isolated: bool = True) -> StorageNode:
    store = None if folder is None else SegmentStore(folder, 16 << 20, segment_bytes=1 << 20)
    return StorageNode("node-0", Arena(8 << 20, 4 << 10), store=store, isolated=isolated)


@pytest.fixture
def node() -> StorageNode:
    return new_node()


def put(node: StorageNode, chunk: SampleChunk, tenant: str) -> bool:
    """Whether it was stored anew."""
    pending = node.begin_put(
        chunk.chunk_id, chunk.encoding, len(chunk.data), options=PutOptions(tenant=tenant)
    )
    if pending is None:
        return False
    pending.write(chunk.data)
    return pending.commit()


def read(node: StorageNode, chunk: SampleChunk, tenant: str) -> bytes | None:
    try:
        with node.open(chunk.chunk_id, chunk.encoding, tenant=tenant) as reader:
            return b"".join(view for views in reader.pieces(0, 0, 1 << 20) for view in views)
    except ChunkNotFoundError:
        return None


def test_a_chunk_is_stored_once_for_each_tenant(node: StorageNode) -> None:
    assert put(node, THEIRS, "b")
    assert put(node, OURS, "a")
    assert not put(node, OURS, "a")
    assert read(node, OURS, "a") == OURS.data
    assert read(node, OURS, "b") == THEIRS.data
    assert read(node, OURS, "c") is None
    node.check_integrity()


def test_a_lookup_counts_no_context_of_another_tenant(node: StorageNode) -> None:
    put(node, ELSEWHERE, "b")
    for any_context in (False, True):
        for all_encodings in (False, True):
            asked = LookupRequest(
                [OURS.chunk_id],
                [OURS.encoding],
                lease_s=60,
                tenant="a",
                any_context=any_context,
                all_encodings=all_encodings,
            )
            result = node.lookup(asked)
            assert result == new_node().lookup(asked)
    put(node, ELSEWHERE, "a")
    (answer,) = node.lookup(LookupRequest([OURS.chunk_id], [OURS.encoding], tenant="a")).answers
    assert answer.other_contexts == 1


def test_a_lease_ends_by_its_tenant_only(node: StorageNode) -> None:
    put(node, OURS, "a")
    asked = LookupRequest([OURS.chunk_id], [OURS.encoding], lease_s=60, use_follows=True, tenant="a")
    lease_id = node.lookup(asked).lease_id
    assert lease_id is not None
    assert not node.use(lease_id, b"\1", 256, "b")
    assert not node.renew_lease(lease_id, 60, "b")
    assert not node.release_lease(lease_id, "b")
    assert node.use(lease_id, b"\1", 256, "a")
    assert node.renew_lease(lease_id, 60, "a")
    assert node.release_lease(lease_id, None)  # a caller of every tenant


def test_frames_of_another_tenant_are_not_found(node: StorageNode) -> None:
    put(node, THEIRS, "b")
    first = [pb.ReadRange(frame_count=1)]
    with node.read_frames([OURS.chunk_id], [OURS.encoding], first, "a") as frames:
        (data,) = frames
    assert isinstance(data.failure, ChunkNotFoundError)
    with node.read_frames([OURS.chunk_id], [OURS.encoding], first, "b") as frames:
        assert b"".join(next(iter(frames)).views) == THEIRS.frames(0, 1)


def test_deleting_reporting_and_verifying_meet_only_the_tenants_own(
    node: StorageNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(node, THEIRS, "b")
    assert node.delete([OURS.chunk_id], "a") == 0
    heard: list[float] = []
    monkeypatch.setattr(node._catalog, "report", lambda _, score: heard.append(score))
    node.report([OURS.chunk_id], [0.5], "a")
    assert not heard
    assert node.verify(OURS.chunk_id, OURS.encoding, "a") is None
    assert [progress.checked for progress in scrub(node, "a")] == [0]
    assert [progress.checked for progress in scrub(node)] == [1]
    assert [variant.tenant for variant in node.list(tenant="a")[0]] == []
    put(node, OURS, "a")
    assert node.delete([OURS.chunk_id], "a") == 1
    assert read(node, OURS, "b") == THEIRS.data


def test_a_pin_holds_the_chunk_of_its_tenant(node: StorageNode) -> None:
    put(node, THEIRS, "b")
    node.set_pins({"a": {OURS.chunk_id}})
    put(node, OURS, "a")
    assert [(variant.tenant, variant.pinned) for variant in node.list()[0]] == [("b", False), ("a", True)]
    node.set_pins({"b": {OURS.chunk_id}})
    assert [(variant.tenant, variant.pinned) for variant in node.list()[0]] == [("b", True), ("a", False)]


def test_a_node_that_keeps_no_tenants_apart_has_one_pin_for_all() -> None:
    node = new_node(isolated=False)
    put(node, THEIRS, "b")
    node.set_pins({"": {OURS.chunk_id}, "b": {ELSEWHERE.chunk_id}})
    put(node, ELSEWHERE, "b")
    assert [variant.pinned for variant in node.list()[0]] == [True, False]


def test_tenants_that_are_gone_leave_nothing(node: StorageNode) -> None:
    for number in range(100):
        put(node, OURS, str(number))
    for number in range(100):
        assert node.delete([OURS.chunk_id], str(number)) == 1
    assert not node._index._namespaces
    node.check_integrity()


@pytest.mark.parametrize("sealed", [True, False], ids=["with indexes", "scanned"])
def test_a_restart_keeps_tenants_apart(tmp_path: Path, sealed: bool) -> None:
    node = new_node(tmp_path)
    assert put(node, THEIRS, "b")
    assert put(node, OURS, "a")
    assert put(node, OURS, "gone")
    assert node.delete([OURS.chunk_id], "gone") == 1
    node.close()
    if not sealed:
        for index in tmp_path.glob("*.index"):
            index.unlink()
    node = new_node(tmp_path)
    assert [read(node, OURS, tenant) for tenant in ("a", "b", "gone")] == [OURS.data, THEIRS.data, None]
    node.check_integrity()
    node.close()
    # Without isolation the newest one is the chunk.
    node = new_node(tmp_path, isolated=False)
    assert node.stats().chunks <= 1
    node.check_integrity()
    node.close()


ACTS = st.tuples(
    st.sampled_from(["put", "delete", "read", "list", "lookup", "restart"]),
    st.sampled_from(["", "a", "b"]),
    st.sampled_from([OURS, THEIRS, ELSEWHERE]),
)


@settings(max_examples=60)
@given(acts=st.lists(ACTS, max_size=30))
def test_a_tenant_sees_what_it_would_see_alone(acts: list[tuple[str, str, SampleChunk]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        shared = new_node(Path(folder) / "shared")
        alone = {tenant: new_node(Path(folder) / f"of-{tenant}") for tenant in ("", "a", "b")}
        for act, tenant, chunk in acts:
            if act == "restart":
                shared.close()
                shared = new_node(Path(folder) / "shared")
                continue
            seen: Callable[[StorageNode], object] = {
                "put": lambda node: put(node, chunk, tenant),  # noqa: B023
                "delete": lambda node: node.delete([chunk.chunk_id], tenant),  # noqa: B023
                "read": lambda node: read(node, chunk, tenant),  # noqa: B023
                "list": lambda node: sorted(
                    (one.chunk_id.prefix_id, one.size_bytes, one.tenant)
                    for one in node.list(tenant=tenant)[0]  # noqa: B023
                ),
                "lookup": lambda node: node.lookup(
                    LookupRequest([chunk.chunk_id], [chunk.encoding], tenant=tenant, peek=True)  # noqa: B023
                ).answers[0][:4],
            }[act]
            assert seen(shared) == seen(alone[tenant])
        shared.check_integrity()
        for node in (shared, *alone.values()):
            node.close()


@pytest.mark.parametrize("restarts", [1, 3])
def test_a_chunk_that_was_deleted_before_tenants_were_kept_apart_stays_deleted(
    tmp_path: Path, restarts: int
) -> None:
    """The other tenant's chunk of the same name had replaced it on disk, and was deleted for both."""
    calibrated = [
        sample_chunk(content=1, encoding="medium-klt-pco", calibration=bytes([number]) * 32)
        for number in (1, 2)
    ]
    node = new_node(tmp_path, isolated=False)
    for chunk, tenant in zip(calibrated, ("ours", "theirs"), strict=True):
        assert put_calibrated(node, chunk, tenant)
        while node.maintain():
            pass
    kept = sample_chunk(content=2)
    assert put(node, kept, "ours")
    assert node.delete([OURS.chunk_id]) == 1
    node.close()
    for _ in range(restarts):
        node = new_node(tmp_path)
        for tenant in ("ours", "theirs"):
            assert read(node, calibrated[0], tenant) is None
        assert read(node, kept, "ours") == kept.data
        node.check_integrity()
        node.close()


def test_chunks_of_the_same_name_survive_restarts_of_a_node_that_keeps_tenants_apart(tmp_path: Path) -> None:
    for known in (False, True, True):
        node = new_node(tmp_path)
        assert put(node, OURS, "ours") is not known
        assert put(node, THEIRS, "theirs") is not known
        node.close()
    node = new_node(tmp_path, isolated=False)  # one of both is found, and from now on they are one chunk
    assert len(node.list()[0]) == 1
    node.close()
    node = new_node(tmp_path)
    assert len(node.list()[0]) == 1
    node.close()


def put_calibrated(node: StorageNode, chunk: SampleChunk, tenant: str) -> bool:
    """Stores a chunk in place of one with another calibration. Returns whether it was stored anew."""
    options = PutOptions(tenant=tenant)
    size_bytes, calibration = len(chunk.data), chunk.header.calibration
    pending = node.begin_put(chunk.chunk_id, chunk.encoding, size_bytes, calibration, options)
    assert pending is not None
    pending.write(chunk.data)
    return pending.commit()
