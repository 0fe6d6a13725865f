"""Storage nodes on a Ray cluster whose nodes come and go."""

import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from kvstore_api.v1 import kvstore_pb2 as pb
from kvstore_cluster.background import background_health
from kvstore_codec.errors import ConfigurationError
from kvstore_service.admin import ClusterAdmin
from kvstore_service.cluster_stats import cluster_stats
from kvstore_service.embedded import EmbeddedCluster
from kvstore_service.local_ray import ENVIRONMENT
from kvstore_service.settings import settings_of
from tests.sample_chunk import sample_chunk
from tests.service.test_embedded import found, members, put, wait_until

# Ray's test cluster keeps its processes' pipes.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::ResourceWarning")]

MEMORY, DISK = 2 << 20, 64 << 20
NAMES = ["one", "two", "three"]
CHUNKS = [sample_chunk(content=number, frame_bytes=20_000) for number in range(30)]  # 7 MB


@pytest.fixture
def three_ray_nodes(monkeypatch: pytest.MonkeyPatch) -> Iterator["object"]:
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    from ray.cluster_utils import Cluster

    options: dict[str, object] = {"num_cpus": 1, "object_store_memory": 80 << 20}
    quick = {
        "health_check_initial_delay_ms": 0,
        "health_check_period_ms": 300,
        "health_check_timeout_ms": 300,
        "health_check_failure_threshold": 2,
    }
    cluster = Cluster(initialize_head=True, head_node_args=options | {"num_cpus": 0, "_system_config": quick})
    try:
        for name in NAMES:
            cluster.add_node(**options, node_name=name)
        yield cluster
    finally:
        cluster.shutdown()


def test_each_ray_node_has_a_storage_node_whenever_it_joins(three_ray_nodes, tmp_path: Path) -> None:
    with EmbeddedCluster(
        settings_of(
            ray_address=three_ray_nodes.address,
            memory=MEMORY,
            disk=DISK,
            data_dir=tmp_path,
            insecure=True,
        )
    ) as cluster:
        nodes = cluster_stats(cluster.address).nodes
        assert sorted(node.member.node_id for node in nodes) == sorted(NAMES)
        assert len({node.member.domain for node in nodes}) == cluster.size == 3
        lost = three_ray_nodes.list_all_nodes()[-1]
        (victim,) = (node.member for node in nodes if node.member.domain == lost.node_id)
        assert {put(victim.endpoint, chunk) for chunk in CHUNKS} == {pb.PUT_STATUS_STORED}
        three_ray_nodes.remove_node(lost, allow_graceful=False)
        wait_until(lambda: victim.node_id not in members(cluster), patience_s=60)
        three_ray_nodes.add_node(num_cpus=1, object_store_memory=80 << 20, node_name=victim.node_id)
        three_ray_nodes.add_node(num_cpus=1, object_store_memory=80 << 20, node_name="four")
        wait_until(lambda: {victim.node_id, "four"} <= members(cluster).keys(), patience_s=60)
        assert all(found(members(cluster)[victim.node_id].endpoint, chunk) for chunk in CHUNKS)


def nodes(cluster: EmbeddedCluster) -> dict[str, pb.Member]:
    """All known nodes, including dead ones."""
    return {node.member.node_id: node.member for node in cluster_stats(cluster.address).nodes}


def test_nodes_outlive_the_gateway(three_ray_nodes: Any, tmp_path: Path) -> None:
    def cluster(**settings: Any) -> EmbeddedCluster:
        options = {"memory": MEMORY, "disk": DISK, "data_dir": tmp_path, "insecure": True, "keep_nodes": True}
        return EmbeddedCluster(settings_of(ray_address=three_ray_nodes.address, **options | settings))

    (tmp_path / "nodes").mkdir()
    (tmp_path / "nodes" / "three").write_text("not a folder")
    with cluster() as first:
        assert sorted(members(first)) == ["one", "two"]  # the broken disk of one keeps nobody else away
        one = members(first)["one"].endpoint
        assert {put(one, chunk) for chunk in CHUNKS} == {pb.PUT_STATUS_STORED}
        with ClusterAdmin(first.address) as admin:
            admin.drain("two")
        (tmp_path / "nodes" / "three").unlink()
        wait_until(lambda: "three" in members(first), patience_s=60)
        pids = first.storage_pids()
    os.kill(pids["two"], signal.SIGKILL)  # Ray starts it again, also without a coordinator
    with cluster() as second:
        wait_until(lambda: len(members(second)) == 3, patience_s=30)
        assert {name for name, pid in second.storage_pids().items() if pid != pids[name]} == {"two"}
        assert nodes(second)["two"].draining
    with cluster(memory=2 * MEMORY) as third:
        wait_until(lambda: len(members(third)) == 3, patience_s=30)

        def limits() -> list[int]:
            return [node.stats.bytes_limit for node in cluster_stats(third.address).nodes]

        wait_until(lambda: limits() == 3 * [2 * MEMORY], patience_s=60)
        assert not pids.items() & third.storage_pids().items()
        assert all(found(members(third)["one"].endpoint, chunk) for chunk in CHUNKS)
        assert nodes(third)["two"].draining
        two = nodes(third)["two"].domain
        (home,) = (node for node in three_ray_nodes.list_all_nodes() if node.node_id == two)
        three_ray_nodes.remove_node(home, allow_graceful=False)

        def known() -> list[str]:
            return sorted(nodes(third))

        wait_until(lambda: known() == ["one", "three"], patience_s=60)  # it was drained, so it is forgotten
        three_ray_nodes.add_node(num_cpus=1, object_store_memory=80 << 20, node_name="two")
        wait_until(lambda: "two" in members(third), patience_s=60)
        assert not nodes(third)["two"].draining


def test_settings_that_do_not_work_stop_at_the_first_node(three_ray_nodes: Any, tmp_path: Path) -> None:
    options = {"memory": MEMORY, "disk": DISK, "insecure": True, "ray_address": three_ray_nodes.address}
    right, wrong = tmp_path / "right", tmp_path / "wrong"
    wrong.mkdir()
    (wrong / "nodes").write_text("not a folder")
    with EmbeddedCluster(settings_of(**options, data_dir=right, keep_nodes=True)) as cluster:
        pids = cluster.storage_pids()
    with EmbeddedCluster(settings_of(**options, data_dir=wrong, keep_nodes=True)) as cluster:
        wait_until(lambda: "kvstore-placement" in background_health().failing, patience_s=60)
        assert "Not a directory" in background_health().failing["kvstore-placement"]
        steps = background_health().errors
        wait_until(
            lambda: background_health().errors >= steps + 3, patience_s=60
        )  # it had the time for others
        assert sum(map(psutil.pid_exists, pids.values())) == 2
        wait_until(lambda: len(members(cluster)) == 2, patience_s=30)
    with EmbeddedCluster(settings_of(**options, data_dir=right)) as cluster:  # ends them, at its end
        wait_until(lambda: len(members(cluster)) == 3, patience_s=60)
    wait_until(lambda: not any(map(psutil.pid_exists, pids.values())), patience_s=30)
    assert not [thread for thread in threading.enumerate() if thread.name == "kvstore-placement"]


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"ray_join": True}, "need ray_address"),
        ({"keep_nodes": True}, "need ray_address"),
        ({"storage_port": 7421}, "need ray_address"),
        ({"ray_address": "x:1", "keep_nodes": True, "credentials": "c.json"}, "needs node_token_file"),
    ],
)
def test_settings_that_do_not_fit(settings: dict[str, Any], error: str) -> None:
    with pytest.raises(ConfigurationError, match=error):
        settings_of(**settings)
