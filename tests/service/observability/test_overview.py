"""What people are told of a cluster: the sentence about its health, rates, and `kvstore top`."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from kvstore_api.v1 import kvstore_pb2 as pb
from kvstore_client import connect
from kvstore_service.cli.app import app
from kvstore_service.observability.overview import Health, Observer, health_of
from tests.client.chunks import ids
from tests.service.observability.screenshots import made_up_stats
from tests.service.observability.watched import fetch, put, watched_cluster


def node(reply: pb.ClusterStatsReply, name: str, **counters: int) -> pb.NodeStatus:
    made = reply.nodes.add(alive=True)
    made.member.node_id = made.stats.node_id = name
    for counter, count in counters.items():
        made.stats.counters[counter] = count
    return made


def test_a_sentence_says_how_the_cluster_is() -> None:
    assert health_of(pb.ClusterStatsReply())[0] is Health.BAD
    reply = pb.ClusterStatsReply()
    first = node(reply, "node-0")
    assert health_of(reply) == (Health.GOOD, "All is well: 1 storage node answers.")
    second = node(reply, "node-1")
    second.member.draining = True
    assert health_of(reply) == (Health.GOOD, "All is well; node-1 is being drained.")
    first.stats.disk_error = "it is gone"
    second.stats.gauges["repair_left"] = 3
    assert health_of(reply) == (
        Health.WARNING,
        "2 of 2 storage nodes answer; node-0 has trouble, 3 variants lack a replica.",
    )
    for one in (first, second):
        one.ClearField("stats")
    assert health_of(reply)[0] is Health.BAD
    assert "node-7 does not answer" in health_of(made_up_stats(100))[1]


def test_rates_are_between_two_answers_and_survive_a_restart() -> None:
    observer = Observer()

    def observed(now_s: float, **counters: int):  # type: ignore[no-untyped-def]
        reply = pb.ClusterStatsReply()
        node(reply, "node-0", **counters)
        return observer.observe(reply, now_s)

    first = observed(0, hits=90, misses=10, bytes_out=1000)
    assert (first.hit_rate, first.out_Bps) == (0.9, None)
    second = observed(2, hits=95, misses=25, bytes_out=5000)
    assert (second.hit_rate, second.out_Bps) == (0.25, 2000)
    assert second.nodes[0].out_Bps == 2000
    assert observed(4, hits=95, misses=25, bytes_out=5000).hit_rate is None
    restarted = observed(6, hits=1, misses=1, bytes_out=100)
    assert (restarted.hit_rate, restarted.out_Bps) == (0.5, 50)


def test_the_tenants_of_all_nodes_are_added_up() -> None:
    (largest, *_, smallest) = Observer().observe(made_up_stats(3), 0.0).tenants
    assert (largest.name, largest.stored_bytes, largest.limit_bytes) == ("acme", 600 * 10**9, 750 * 10**9)
    assert largest.hit_rate == pytest.approx(0.9)
    assert (smallest.name, smallest.limit_bytes) == ("", 0)


def test_top_shows_a_real_cluster(tmp_path: Path) -> None:
    with watched_cluster(tmp_path) as cluster, connect(cluster.address, tenant="acme") as client:
        document = ids(3)
        put(client, document)
        fetch(client, document)
        arguments = ["top", "--once", "--period", "0.2", "--tenants", "--address", cluster.address]
        shown = CliRunner().invoke(app, arguments)
        assert shown.exit_code == 0, shown.output
        for text in (
            "All is well: 2 storage nodes answer.",
            "node-0",
            "node-1",
            "acme",
            "exact-zstd",
            "memory",
        ):
            assert text in shown.stdout
        cluster.nodes[1].stop_serving()
        shown = CliRunner().invoke(app, arguments)
        assert "node-1 does not answer" in shown.stdout


def test_top_says_when_nobody_answers(unused_port: int) -> None:
    result = CliRunner().invoke(app, ["top", "--once", "--address", f"127.0.0.1:{unused_port}"])
    assert "no cluster answers" in str(result.exception)
