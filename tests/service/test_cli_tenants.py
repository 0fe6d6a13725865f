"""The commands that look after tenants, against real servers in this process."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvstore_codec.errors import KVStoreError
from tests.service.admin_cluster import TENANTS, Cluster, administered, listed, names
from tests.service.bulk_port import wait_until


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    with administered(tmp_path) as made:
        yield made


def test_tenants(cluster: Cluster) -> None:
    report = cluster.kvstore("tenants", "list")
    assert not report["more"]
    rows = {row["tenant"]: row for row in report["tenants"]}
    assert rows.keys() == set(TENANTS)
    for tenant, chunks in (("", cluster.chunks[::2]), ("blue", cluster.chunks[1::2])):
        row, size_bytes = rows[tenant], sum(len(chunk.data) for chunk in chunks)
        assert (row["chunks"], row["memory_chunks"], row["disk_chunks"]) == (10, 10, 10)
        assert (row["bytes"], row["memory_bytes"], row["disk_bytes"]) == (size_bytes,) * 3
        assert row["quota_bytes"] is None
    cluster.kvstore("quota", "blue", "1GiB")
    (row,) = cluster.kvstore("tenants", "list", "--tenant", "blue")["tenants"]
    assert (row["tenant"], row["quota_bytes"]) == ("blue", 1 << 30)
    assert cluster.kvstore("tenants", "list", "--limit", "1")["more"]
    text = cluster.text("tenants", "list", "--limit", "1")
    assert all(part in text for part in ("in memory", "on disk", "more than 1"))


def test_tenants_forget(cluster: Cluster) -> None:
    cluster.text("tenants", "forget", "blue", stdin="n\n", status=1)
    assert len(cluster.kvstore("ls")["chunks"]) == 20
    assert cluster.kvstore("tenants", "forget", "blue", "--yes") == {"tenant": "blue", "away": []}
    assert listed(cluster.kvstore("ls")) == names(cluster.chunks[::2])
    # A node that is away hears of it when it returns.
    away = cluster.cells["node-1"]
    with cluster.hearing:
        cluster.away.add("node-1")
    away.server.stop(0)
    cluster.coordinator.mark_dead("node-1", away.incarnation, "away")
    text = cluster.text("tenants", "forget", "", "--yes")
    assert "tenant (default) is forgotten" in text
    assert "node-1 will do so" in text
    assert cluster.kvstore("tenants", "list")["tenants"] == []
    assert away.node.usage()
    with cluster.hearing:
        cluster.away.clear()
    wait_until(lambda: not away.node.usage())


def test_a_node_that_does_not_forget_is_named(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["kvstore_service.cli.tenants"], "_PATIENCE_S", 0.3)
    with cluster.hearing:
        cluster.away.add("node-0")
    with pytest.raises(KVStoreError, match="node-0 did not remove the chunks within"):
        cluster.text("tenants", "forget", "blue", "--yes")
