"""The commands that look after a running cluster, against real servers in this process."""

import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kvstore_api.placement import Placement
from kvstore_cluster.put import PutOptions
from kvstore_codec.errors import KVStoreError
from tests.sample_chunk import sample_chunk
from tests.service.admin_cluster import TENANTS, Cluster, administered, listed, names


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    with administered(tmp_path) as made:
        yield made


def test_ls(cluster: Cluster) -> None:
    report = cluster.kvstore("ls")
    assert listed(report) == names(cluster.chunks)
    assert not report["more"]
    row = report["chunks"][0]
    assert (row["encoding"], row["in_memory"], row["on_disk"], row["pinned"]) == (
        "exact-zstd",
        True,
        True,
        False,
    )
    assert {row["tenant"] for row in report["chunks"]} == set(TENANTS)
    by_node = [cluster.kvstore("ls", "--node", name)["chunks"] for name in cluster.cells]
    assert sum(map(len, by_node)) == 20
    assert all(row["node_id"] == "node-0" for row in by_node[0])
    assert listed(cluster.kvstore("ls", "--tenant", "blue")) == names(cluster.chunks[1::2])
    assert listed(cluster.kvstore("ls", "--tenant", "")) == names(cluster.chunks[::2])
    first = cluster.chunks[0].chunk_id.content_id.hex()
    for digits in (7, 8, 64):
        assert listed(cluster.kvstore("ls", "--prefix", first[:digits])) == names(cluster.chunks[:1])
    page = cluster.kvstore("ls", "--limit", "3")
    assert (len(page["chunks"]), page["more"]) == (3, True)
    assert len(cluster.kvstore("ls", "--limit", "0")["chunks"]) == 20
    text = cluster.text("ls", "--limit", "3")
    assert all(part in text for part in (page["chunks"][0]["content_id"][:16], "memory+disk", "more than 3"))


def test_pin_and_unpin(cluster: Cluster, tmp_path: Path) -> None:
    first, second, third = (chunk.chunk_id for chunk in cluster.chunks[:3])
    assert cluster.kvstore("pin", first.content_id.hex()[:12])["pins"] == 1
    file = tmp_path / "chunks.txt"
    file.write_text(f"{second.content_id.hex()}+{second.prefix_id.hex()[:5]}\n\n{first.content_id.hex()}\n")
    report = cluster.kvstore("pin", third.content_id.hex().upper(), "--from", str(file))
    assert (set(report["pinned"]), report["pins"]) == (names(cluster.chunks[:3]), 3)
    assert set(cluster.kvstore("pin")["pinned"]) == names(cluster.chunks[:3])
    # A whole name may be pinned before it is stored.
    absent = sample_chunk(500)
    assert cluster.kvstore("pin", names([absent]).pop())["pins"] == 4
    wait_for(lambda: {row["pinned"] for row in cluster.kvstore("ls")["chunks"]} == {True, False})
    pinned = {"chunks": [row for row in cluster.kvstore("ls")["chunks"] if row["pinned"]]}
    assert listed(pinned) == names(cluster.chunks[:3])
    assert "unpinned 1 chunk; 3 are" in cluster.text("unpin", absent.chunk_id.content_id.hex()[:12])
    assert cluster.kvstore("unpin", "--from", "-", stdin=file.read_text())["pins"] == 1
    assert third.content_id.hex()[:32] in cluster.text("pin")


def test_names_that_do_not_name_one_chunk_are_refused(cluster: Cluster) -> None:
    content = cluster.chunks[0].chunk_id.content_id.hex()
    for arguments, reason in (
        (("pin", "xyz!"), "is not the name of a chunk"),
        (("pin", "abc"), "4 to 64 hexadecimal digits"),
        (("pin", "0" * 64), "there is no chunk"),
        (("pin", f"{content}+{'0' * 10}"), "there is no chunk"),
        (("unpin", content), "there is no chunk"),
        (("unpin",), "no chunks were given"),
        (("pin", "--from", "/nowhere/chunks"), "cannot read chunks from"),
        (("ls", "--prefix", "zz"), "is not the beginning"),
        (("ls", "--node", "node-9"), "live nodes: node-0, node-1"),
        (("evict",), "name what to evict"),
        (("evict", content, "--all"), "name what to evict"),
        (("drain", "node-9"), "no node 'node-9'; known are node-0, node-1"),
        (("quota", "blue"), "needs a size"),
        (("quota", "blue", "much"), "not a size"),
    ):
        with pytest.raises(KVStoreError, match=reason) as refused:
            cluster.text(*arguments)
        assert "\n" not in str(refused.value)


def test_ambiguous_beginnings_name_what_they_could_be(cluster: Cluster) -> None:
    contexts = [sample_chunk(0, context) for context in (1, 2)]
    for chunk in contexts:
        put = cluster.cells["node-0"].node.begin_put(chunk.chunk_id, chunk.encoding, len(chunk.data))
        assert put is not None
        put.write(chunk.data)
        put.commit()
    content = contexts[0].chunk_id.content_id.hex()
    with pytest.raises(
        KVStoreError, match=rf"matches {content[:16]}\+.*, {content[:16]}\+.*; write more digits"
    ):
        cluster.text("pin", content[:10])
    # The whole content_id alone is the chunk in all of its contexts.
    assert cluster.kvstore("pin", content)["pins"] == 3


def test_evict(cluster: Cluster) -> None:
    first = cluster.chunks[0]
    name = first.chunk_id.content_id.hex()[:12]
    assert "Aborted" in cluster.text("evict", name, stdin="n\n", status=1)
    assert cluster.stored(first)
    assert "Remove 1 chunks from 2 nodes?" in cluster.text("evict", name, stdin="y\n")
    assert not cluster.stored(first)
    report = cluster.kvstore("evict", "--tenant", "blue", "--yes")
    assert (report["chunks"], sum(report["deleted"].values())) == (10, 10)
    assert listed(cluster.kvstore("ls")) == names(cluster.chunks[2::2])
    assert sum(cluster.kvstore("evict", "--all", "--yes")["deleted"].values()) == 9
    assert cluster.kvstore("ls")["chunks"] == []
    assert cluster.kvstore("evict", "--all")["chunks"] == 0  # nothing to ask about


def test_drain(cluster: Cluster) -> None:
    held = cluster.cells["node-0"].node.stats().chunks
    assert held
    report = cluster.kvstore("drain", "node-0", "--wait")
    assert report == {"node_id": "node-0", "draining": True, "left": 0}
    assert all("node-1" in cluster.stored(chunk) for chunk in cluster.chunks)
    assert "draining" in cluster.text("status")
    assert "may be removed" in cluster.text("drain", "node-0")
    assert cluster.kvstore("drain", "node-0", "--cancel")["draining"] is False
    assert not cluster.kvstore("status")["nodes"][0]["draining"]


def test_repair(cluster: Cluster) -> None:
    placement = Placement(cluster.coordinator.membership().members)
    contents = [chunk.chunk_id.content_id for chunk in cluster.chunks]
    misplaced = next(
        chunk
        for chunk, owners in zip(cluster.chunks, placement.owners(contents), strict=True)
        if owners[0].node_id == "node-0"
    )
    wait_for(lambda: all(cell.worker.gauges(0)["repair_epoch"] for cell in cluster.cells.values()))
    cluster.cells["node-0"].node.delete([misplaced.chunk_id])
    put = cluster.cells["node-1"].node.begin_put(misplaced.chunk_id, misplaced.encoding, len(misplaced.data))
    assert put is not None
    put.write(misplaced.data)
    put.commit()
    report = cluster.kvstore("repair", "--wait")
    assert report["round"] == 1
    assert {row["node_id"]: row["copies_sent"] for row in report["nodes"]} == {"node-0": 0, "node-1": 1}
    assert cluster.stored(misplaced) == {"node-0", "node-1"}
    assert cluster.kvstore("repair")["round"] == 2
    assert "round 3 of repair: 21 chunks checked" in cluster.text("repair", "--wait")


def test_verify(cluster: Cluster, tmp_path: Path) -> None:
    report = cluster.kvstore("verify")
    assert sum(row["checked"] for row in report["nodes"]) == 20
    assert report["damaged"] == []
    segment = max((tmp_path / "disk-0").glob("segment-*"), key=lambda path: path.stat().st_size)
    data = bytearray(segment.read_bytes())
    victim = next(chunk for chunk in cluster.chunks if chunk.data[-64:] in data)
    data[data.find(victim.data[-64:]) + 30] ^= 1
    segment.write_bytes(data)
    text = cluster.text("verify", "--node", "node-0", status=1)
    assert all(part in text for part in (victim.chunk_id.content_id.hex()[:16], "1 damaged"))
    # The damaged copy has gone.
    assert cluster.kvstore("verify")["damaged"] == []


def test_quota(cluster: Cluster) -> None:
    assert cluster.kvstore("quota", "blue", "20GiB")["quotas"] == [
        {"tenant": "blue", "limit_bytes": 20 << 30}
    ]
    assert len(cluster.kvstore("quota", "", "1000")["quotas"]) == 2
    assert all(part in cluster.text("quota") for part in ("(default)", "1.0 kB", "21.5 GB"))
    assert cluster.kvstore("quota", "", "0")["quotas"] == [{"tenant": "blue", "limit_bytes": 20 << 30}]


def test_names_that_look_like_markup_are_shown_as_they_are(cluster: Cluster) -> None:
    tenant = "[bold]blue[/x]"
    cluster.kvstore("quota", tenant, "20GiB")
    assert tenant in cluster.text("quota")
    chunk = sample_chunk(900)
    node = cluster.cells["node-0"].node
    put = node.begin_put(chunk.chunk_id, chunk.encoding, len(chunk.data), options=PutOptions(tenant=tenant))
    assert put is not None
    put.write(chunk.data)
    put.commit()
    assert tenant in cluster.text("ls", "--tenant", tenant)


def test_limits_and_repeated_names(cluster: Cluster) -> None:
    assert "Invalid value" in cluster.text("ls", "--limit", "9" * 20, status=2)
    assert len(cluster.kvstore("ls", "--limit", str(1 << 30))["chunks"]) == 20
    name = names(cluster.chunks[:1]).pop()
    cluster.kvstore("pin", name)
    assert cluster.kvstore("unpin", name, name) == {"unpinned": [name], "pins": 0}


def test_without_nodes_nothing_is_called_well(cluster: Cluster) -> None:
    with cluster.hearing:
        cluster.away |= cluster.cells.keys()
    for record in cluster.coordinator.nodes():
        cluster.coordinator.leave(record.member.node_id, record.incarnation)
    for arguments in (("ls",), ("verify",), ("evict", "--all", "--yes"), ("repair", "--wait")):
        with pytest.raises(KVStoreError, match="no storage node"):
            cluster.text(*arguments)
    # What has a whole name may be pinned all the same.
    assert cluster.kvstore("pin", names(cluster.chunks[:1]).pop())["pins"] == 1


def test_draining_the_last_node_ends_with_the_reason(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules["kvstore_service.cli.drain"], "_STUCK_S", 0.5)
    cluster.kvstore("drain", "node-0", "--wait")
    with pytest.raises(KVStoreError, match="20 chunks that no other node accepts"):
        cluster.text("drain", "node-1", "--wait")
    assert "may be removed" not in cluster.text("drain", "node-1")


def test_status_shows_both_tiers(cluster: Cluster) -> None:
    rows = cluster.kvstore("status")["nodes"]
    assert [row["gauges"]["disk_chunks"] for row in rows] == [row["chunks"] for row in rows]
    assert all(row["gauges"]["disk_bytes_used"] > 0 for row in rows)
    text = cluster.text("status")
    assert all(heading in text for heading in ("memory", "disk", "hits"))
    assert not any(heading in text for heading in ("pinned", "evicted", "repair"))  # nothing to say
    chunk_id = cluster.chunks[0].chunk_id
    cluster.kvstore("pin", f"{chunk_id.content_id.hex()}+{chunk_id.prefix_id.hex()}")
    wait_for(lambda: "pinned" in cluster.text("status"))
    cluster.cells["node-1"].server.stop(0)
    wait_for(lambda: "down" in cluster.text("status"))


def test_what_the_catalogue_cannot_keep_is_one_line(cluster: Cluster, tmp_path: Path) -> None:
    (tmp_path / "catalogue.tmp").mkdir()
    name = names(cluster.chunks[:1]).pop()
    with pytest.raises(KVStoreError, match=r"cannot be written.*\(UNAVAILABLE\)") as refused:
        cluster.text("pin", name)
    assert "\n" not in str(refused.value)


def wait_for(condition: Callable[[], bool], patience_s: float = 10) -> None:
    waited = threading.Event()
    for _ in range(int(patience_s / 0.05)):
        if condition():
            return
        waited.wait(0.05)
    raise AssertionError("did not happen in time")
