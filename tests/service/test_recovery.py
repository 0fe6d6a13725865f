"""Chunks that were acknowledged survive the process, and the Ray node, that acknowledged them."""

import os
import shutil
import signal
from pathlib import Path

import grpc
import pytest

from kvstore_api.placement import Member
from kvstore_api.v1 import kvstore_pb2 as pb
from kvstore_api.v1 import kvstore_pb2_grpc as rpc
from kvstore_codec.errors import ConfigurationError, StartupError
from kvstore_service.cluster_stats import cluster_stats
from kvstore_service.embedded import EmbeddedCluster
from kvstore_service.settings import settings_of
from tests.sample_chunk import sample_chunk
from tests.service.test_embedded import found, members, put, wait_until

MEMORY, DISK = 2 << 20, 64 << 20
CHUNKS = [sample_chunk(content=number, frame_bytes=20_000) for number in range(30)]  # 7 MB


@pytest.mark.slow
def test_a_killed_node_comes_back_with_what_is_on_its_disk(tmp_path: Path) -> None:
    with EmbeddedCluster(settings_of(memory=MEMORY, disk=DISK, data_dir=tmp_path)) as cluster:
        before = members(cluster)["node-0"]
        assert {put(before.endpoint, chunk) for chunk in CHUNKS} == {pb.PUT_STATUS_STORED}
        os.kill(cluster.storage_pids()["node-0"], signal.SIGKILL)
        wait_until(lambda: members(cluster).get("node-0", before) != before, patience_s=30)
        after = members(cluster)["node-0"]
        assert all(found(after.endpoint, chunk) for chunk in CHUNKS)
        (node,) = cluster_stats(cluster.address).nodes
        assert node.stats.gauges["disk_chunks"] == len(CHUNKS)
    with EmbeddedCluster(settings_of(memory=MEMORY, disk=DISK, data_dir=tmp_path)) as cluster:
        again = members(cluster)["node-0"]
        assert all(found(again.endpoint, chunk) for chunk in CHUNKS)


@pytest.mark.slow
def test_a_data_folder_that_is_removed_is_made_again_with_all_that_was_in_it(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    with EmbeddedCluster(
        settings_of(memory=MEMORY, disk=DISK, data_dir=folder, durability="durable")
    ) as cluster:
        endpoint = members(cluster)["node-0"].endpoint
        assert {put(endpoint, chunk) for chunk in CHUNKS[:20]} == {pb.PUT_STATUS_STORED}
        shutil.rmtree(folder)
        assert {put(endpoint, chunk) for chunk in CHUNKS[20:]} == {pb.PUT_STATUS_STORED}
        assert all(found(endpoint, chunk) for chunk in CHUNKS)

        def well() -> bool:
            (node,) = cluster_stats(cluster.address).nodes
            return node.stats.disk_error == "" and (folder / "catalogue.json").exists()

        wait_until(well, patience_s=30)
        os.kill(cluster.storage_pids()["node-0"], signal.SIGKILL)
    with EmbeddedCluster(settings_of(memory=MEMORY, disk=DISK, data_dir=folder)) as cluster:
        again = members(cluster)["node-0"]
        assert all(found(again.endpoint, chunk) for chunk in CHUNKS)


@pytest.mark.slow
def test_a_node_that_is_down_while_its_tenant_is_forgotten_does_not_bring_it_back(tmp_path: Path) -> None:
    with EmbeddedCluster(settings_of(memory=MEMORY, disk=DISK, data_dir=tmp_path)) as cluster:

        def killed(before: Member) -> Member:
            os.kill(cluster.storage_pids()["node-0"], signal.SIGKILL)
            with grpc.insecure_channel(cluster.address) as channel:
                stub = rpc.CoordinatorStub(channel)
                if before is first:
                    assert stub.ForgetTenant(pb.ForgetTenantRequest()).waiting == ["node-0"]
            wait_until(lambda: members(cluster).get("node-0", before) != before, patience_s=30)
            return members(cluster)["node-0"]

        first = members(cluster)["node-0"]
        assert {put(first.endpoint, chunk) for chunk in CHUNKS} == {pb.PUT_STATUS_STORED}
        second = killed(first)
        assert not any(found(second.endpoint, chunk) for chunk in CHUNKS)
        assert put(second.endpoint, CHUNKS[0]) == pb.PUT_STATUS_STORED
        third = killed(second)
        assert [found(third.endpoint, chunk) for chunk in CHUNKS] == [True] + [False] * (len(CHUNKS) - 1)


def test_a_disk_needs_a_folder() -> None:
    with pytest.raises(ConfigurationError, match="disk needs data_dir, a folder"):
        EmbeddedCluster(settings_of(disk=DISK))


def test_no_ray_cluster_is_an_error_that_says_so() -> None:
    cluster = EmbeddedCluster(settings_of(ray_address="127.0.0.1:9", memory=MEMORY, insecure=True))
    with pytest.raises(StartupError, match=r"cannot connect to a Ray cluster at 127\.0\.0\.1:9 "):
        cluster.start()
