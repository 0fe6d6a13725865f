"""The table of metrics, held against what a cluster and a client export."""

from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
from prometheus_client import REGISTRY, CollectorRegistry, generate_latest
from prometheus_client.metrics_core import Metric as Family
from prometheus_client.parser import text_string_to_metric_families

from kvstore_api.v1 import kvstore_pb2 as pb
from kvstore_client import connect
from kvstore_client.metric import Kind, Metric
from kvstore_client.metrics import ClientMetrics
from kvstore_client.miss_reason import MissReason
from kvstore_client.planning.links import Links
from kvstore_service.metrics import ClusterCollector
from kvstore_service.observability.node_metrics import EVENTS
from kvstore_service.observability.table import METRICS
from tests.client.chunks import ids
from tests.cluster.encryption.stores import NEW, keys_of
from tests.service.observability.metrics_page import metrics_page
from tests.service.observability.watched import WatchedCluster, fetch, put, watched_cluster


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WatchedCluster]:
    """A cluster after work of two tenants and one that has too little room, and with limits."""
    with watched_cluster(tmp_path_factory.mktemp("watched"), keys=lambda: keys_of(NEW)) as made:
        for tenant in ("a", "b", "c"):
            made.coordinator.set_quota(tenant, 8 << 20)
        made.tell()
        for seed, tenant in enumerate(("a", "b", "c")):
            with connect(made.address, tenant=tenant, tenant_salt=tenant, encoding="exact-zstd") as client:
                for document in (ids(9, seed), ids(9, seed + 10)):
                    assert put(client, document, seed) == 9
                    assert fetch(client, document) == 9
        for watched in made.nodes:
            watched.experiments.set_limits(pb.ThrottleRequest(bandwidth_bps=1e9, disk_read_Bps=1e9))
        yield made


def exported(registry: CollectorRegistry) -> dict[str, Family]:
    """What a scrape of a registry returns of the project, by the names in the table."""
    text = generate_latest(registry).decode()
    families = text_string_to_metric_families(text)
    return {
        family.name + ("_total" if family.type == "counter" else ""): family
        for family in families
        if family.name.startswith("kvstore_") and not family.name.endswith("_created")
    }


def compare(found: dict[str, Family], rows: Iterable[Metric]) -> None:
    table = {row.name: row for row in rows}
    assert set(found) == set(table)
    for name, family in found.items():
        row = table[name]
        assert family.type == row.kind, name
        assert family.documentation == row.meaning, name
        for sample in family.samples:
            labels = {key: value for key, value in sample.labels.items() if key != "le"}
            assert set(labels) == set(row.label_names), name
            for label in row.labels:
                if label.values:
                    assert labels[label.name] in label.values, name


def test_a_cluster_exports_what_the_table_says(cluster: WatchedCluster) -> None:
    registry = CollectorRegistry()
    registry.register(cluster.collector)
    found = exported(registry)
    compare(found, [row for row in METRICS["cluster"] if "_events_" not in row.name])
    causes = {
        sample.labels["cause"]: sample.value
        for sample in found["kvstore_node_evictions_by_cause_total"].samples
        if sample.labels["node_id"] == "node-0"
    }
    evictions = {s.labels["node_id"]: s.value for s in found["kvstore_node_evictions_total"].samples}
    assert causes["quota"] > 0
    assert sum(causes.values()) == evictions["node-0"]
    tiers = {sample.labels["tier"] for sample in found["kvstore_node_stored_bytes"].samples}
    assert tiers == {"memory", "disk"}
    served = {
        (s.labels["tier"], s.labels["encoding"]): s.value
        for s in found["kvstore_node_served_bytes_total"].samples
    }
    assert served["memory", "exact-zstd"] > 0


def test_a_cluster_that_publishes_events_exports_what_the_table_says() -> None:
    reply = pb.ClusterStatsReply(events=dict.fromkeys(EVENTS, 1))
    registry = CollectorRegistry()
    registry.register(ClusterCollector(lambda: reply))
    found = exported(registry)
    prefix = "kvstore_events_"
    assert EVENTS.keys() == {
        name.removeprefix(prefix).removesuffix("_total") for name in found if name.startswith(prefix)
    }


def test_only_so_many_tenants_have_metrics_of_their_own(cluster: WatchedCluster) -> None:
    registry = CollectorRegistry()
    registry.register(cluster.collector)
    for _ in range(2):
        found = exported(registry)
        hits = found["kvstore_node_tenant_hits_total"].samples
        tenants = {sample.labels["tenant"] for sample in hits}
        assert len(tenants) == 3
        assert "*" in tenants
        assert all(sample.value > 0 for sample in hits)


def test_without_the_setting_no_tenant_is_named(cluster: WatchedCluster) -> None:
    cluster.collector._most_tenants, before = 0, cluster.collector._most_tenants
    try:
        registry = CollectorRegistry()
        registry.register(cluster.collector)
        assert not [name for name in exported(registry) if "tenant" in name]
    finally:
        cluster.collector._most_tenants = before


def test_a_client_exports_what_the_table_says(cluster: WatchedCluster) -> None:
    document = ids(4, seed=9)
    with connect(cluster.address, fetch_policy="fixed") as client:
        assert put(client, document) == 4
        before = client.metrics.snapshot()
        assert fetch(client, document) == 4
        told = client.metrics.snapshot()
        assert told["tokens_requested"] - before.get("tokens_requested", 0) == 4 * 256
        assert told["tokens_matched"] == told["tokens_requested"]
        client.metrics.missed(MissReason.GONE)
        client.metrics.predicted(1.0, 1.5)
        found = exported(REGISTRY)
        compare(found, METRICS["client"])
        assert found["kvstore_client_bandwidth_bytes_per_second"].samples
        by_encoding = {
            s.labels["encoding"]: s.value for s in found["kvstore_client_fetched_bytes_total"].samples
        }
        assert by_encoding["exact-zstd"] > 0


def test_a_closed_clients_links_are_not_exported_for_ever() -> None:
    links = Links()
    links.observe("gone:1", 1 << 20, 1.0)
    ClientMetrics(links)
    name, labels = "kvstore_client_bandwidth_bytes_per_second", {"endpoint": "gone:1"}
    assert REGISTRY.get_sample_value(name, labels) == pytest.approx(1 << 20)
    del links
    assert REGISTRY.get_sample_value(name, labels) is None


def test_the_rows_are_complete() -> None:
    rows = [row for rows in METRICS.values() for row in rows]
    assert len({row.name for row in rows}) == len(rows)
    for row in rows:
        assert row.name.startswith("kvstore_")
        assert row.meaning.endswith(".")
        assert row.unit
        assert row.kind is not Kind.COUNTER or row.name.endswith("_total")
        assert all(label.values or label.meaning for label in row.labels)


def test_the_page_is_made_from_the_table() -> None:
    page = Path(__file__).parents[3] / "docs" / "metrics.md"
    assert page.read_text() == metrics_page()
