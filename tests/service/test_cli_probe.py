"""Commands that ask a running cluster whether it works."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from kvstore_codec.errors import ConfigurationError, ServiceError
from kvstore_service.cli.app import app
from tests.service.admin_cluster import Cluster, administered


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    with administered(tmp_path) as made:
        yield made


def probe(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["probe", *arguments])


def test_a_probe_tells_whether_a_server_serves(cluster: Cluster) -> None:
    node = cluster.cells["node-0"].server.address
    for arguments in ((cluster.server.address,), (node,), (node, "--service", "background")):
        result = probe(*arguments)
        assert (result.exit_code, result.output) == (0, "SERVING\n")
    for arguments, error in (
        (("127.0.0.1:9", "--timeout", "0.5"), "the server at 127.0.0.1:9 "),
        ((node, "--service", "nobody"), f"the server at {node} "),
    ):
        result = probe(*arguments)
        assert isinstance(result.exception, ServiceError)
        assert str(result.exception).startswith(error)


def test_a_self_test_leaves_nothing_behind(cluster: Cluster) -> None:
    before = len(cluster.kvstore("ls", "--limit", "0")["chunks"])
    assert "8 pages, 0.0 MB" in cluster.text("selftest", "--pages", "8", "--page-kib", "4")
    assert len(cluster.kvstore("ls", "--limit", "0")["chunks"]) == before


def test_nodes_beyond_a_size_are_drained(cluster: Cluster) -> None:
    for arguments in ((), ("node-0", "--beyond", "1")):
        with pytest.raises(ConfigurationError, match="give the id of a node, or --beyond N"):
            cluster.text("drain", *arguments)
    assert cluster.kvstore("drain", "--beyond", "7") == []
    rows = cluster.kvstore("drain", "--beyond", "1", "--wait")
    assert rows == [{"node_id": "node-1", "draining": True, "left": 0}]
    draining = {node["node_id"]: node["draining"] for node in cluster.kvstore("status")["nodes"]}
    assert draining == {"node-0": False, "node-1": True}
