"""The dashboard and the alerts, with a real Prometheus that scrapes real clusters and a worker."""

import json
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from prometheus_client import start_http_server

from kvstore_client import connect
from kvstore_client.fetch import Computing
from kvstore_client.planning import CodecCost, Costs, PrefillCost, Profile
from kvstore_cluster.background import BackgroundLoop
from kvstore_service.listen import Address
from kvstore_service.metrics_server import metrics_endpoint
from kvstore_service.observability import FILES
from kvstore_service.observability.dashboard import dashboard, queries
from tests.client.chunks import SPEC, ids
from tests.client.test_canary import answer, kernel, worker
from tests.service.observability.breakage import SCENES
from tests.service.observability.prometheus import (
    PROMTOOL,
    Prometheus,
    free_port,
    needs_prometheus,
    prometheus,
    wait_until,
)
from tests.service.observability.watched import WatchedCluster, fetch, put, watched_cluster

RULES, DASHBOARD = FILES / "alerts.yaml", FILES / "dashboard.json"
HEALTHY, WORKER = "healthy", "worker"
VARIABLES = {"$__rate_interval": "30s", "$node": ".*"}
CLIENT_ALERTS = {"KVStoreUnreachable", "KVStoreFetchesFail", "KVStoreWorkerRefused"}
APART = {"KVStoreMetricsMissing", "KVStoreBackgroundFails"}
"""Alerts that no other cluster of this process may be watched beside."""


def alerts() -> list[dict[str, str]]:
    return [rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]


def test_the_dashboard_is_made_from_its_rows() -> None:
    assert json.loads(DASHBOARD.read_text()) == dashboard()


def test_every_alert_says_what_happens_and_how_bad_it_is() -> None:
    page = (Path(__file__).parents[3] / "docs" / "observability.md").read_text()
    of_clusters = {alert for scene in SCENES.values() for alert in scene.faults}
    assert {rule["alert"] for rule in alerts()} == {*of_clusters, *CLIENT_ALERTS, *APART}
    for rule in alerts():
        assert set(rule["annotations"]) == {"summary", "description"}  # type: ignore[arg-type]
        assert rule["labels"]["severity"] in ("info", "warning", "critical")  # type: ignore[index]
        assert f"`{rule['alert']}`" in page


@needs_prometheus
def test_promtool_accepts_the_rules() -> None:
    assert PROMTOOL is not None
    subprocess.run([PROMTOOL, "check", "rules", str(RULES)], check=True, capture_output=True)


@dataclass
class Scraped:
    prometheus: Prometheus
    clusters: dict[str, WatchedCluster]
    """By the scene that is to be made of it."""
    folder: Path

    @property
    def healthy(self) -> WatchedCluster:
        return self.clusters[HEALTHY]


@pytest.fixture(scope="module")
def scraped(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scraped]:
    folder = tmp_path_factory.mktemp("scraped")
    with ExitStack() as running:
        clusters: dict[str, WatchedCluster] = {}
        targets = {}
        scenes = {
            HEALTHY: {"nodes": 2, "disk_bytes": 1 << 30},
            **{n: scene.options for n, scene in SCENES.items()},
        }
        for name, options in scenes.items():
            cluster = running.enter_context(watched_cluster(folder / name, **options))
            port = targets[name] = free_port()
            registry = running.enter_context(metrics_endpoint(Address("127.0.0.1", port)))
            registry.register(cluster.collector)
            clusters[name] = cluster
        targets[WORKER] = free_port()
        server, thread = start_http_server(targets[WORKER], "127.0.0.1")
        running.callback(thread.join)
        running.callback(server.server_close)
        running.callback(server.shutdown)
        with prometheus(folder, targets, RULES) as made:
            # Counters must have been scraped once before they grow.
            wait_until(lambda: len(made.query("up == 1")) == len(targets), "all targets to be scraped")
            yield Scraped(made, clusters, folder)


def repeat(work: Callable[[int], object], until: Callable[[], object], what: str) -> None:
    """Do it again and again, until a condition holds."""
    ended = threading.Event()

    def keep_working() -> None:
        round_ = 0
        while not ended.is_set():
            work(round_)
            round_ += 1
            time.sleep(0.3)

    thread = threading.Thread(target=keep_working)
    thread.start()
    try:
        wait_until(until, what)
    finally:
        ended.set()
        thread.join()


@needs_prometheus
@pytest.mark.slow
def test_every_query_of_the_dashboard_has_data_and_nothing_is_alarming(scraped: Scraped) -> None:
    profile = Profile({}, PrefillCost(0.0, 1.0, 0.0), 1.0, 1, unmeasured=CodecCost(1e-6, 0.0))
    cluster = scraped.healthy
    for tenant in ("a", "b", "c"):
        cluster.coordinator.set_quota(tenant, 64 << 20)

    def missing() -> list[str]:
        found = []
        for title, query in queries():
            for variable, value in VARIABLES.items():
                query = query.replace(variable, value)
            if not scraped.prometheus.query(query):
                found.append(f"{title}: {query}")
        return found

    with ExitStack() as opened:
        clients = [
            opened.enter_context(
                connect(cluster.address, tenant=tenant, tenant_salt=tenant, fetch_policy="adaptive")
            )
            for tenant in ("a", "b", "c")
        ]
        engine = opened.enter_context(worker(cluster))  # type: ignore[arg-type]

        def work(round_: int) -> None:
            for number, client in enumerate(clients):
                document = ids(3, seed=3 * round_ + number)
                put(client, document)
                fetch(client, document)
                match = client.match(SPEC, document)
                buffers = client.buffers.acquire(SPEC, match.tokens)
                costs = Computing(Costs(profile), match.tokens, 20, waits=True)
                client.fetch(match, buffers, None, computing=costs).wait()
                client.buffers.release(buffers)
                client.match(SPEC, ids(2, seed=1_000_000 + round_))
            answer(engine)
            if not round_:  # an engine gives a fetch up, which is normal
                match = clients[0].match(SPEC, document)
                clients[0].fetch(match, clients[0].buffers.acquire(SPEC, match.tokens), None).finish()

        try:
            repeat(work, lambda: not missing(), "data of every query")
        finally:
            assert missing() == []
    assert scraped.prometheus.firing() == set()
    assert scraped.prometheus.rules_health() == set()


@needs_prometheus
@pytest.mark.slow
def test_every_alert_about_a_cluster_fires_when_its_fault_is_made(scraped: Scraped) -> None:
    for name, scene in SCENES.items():
        for make in scene.faults.values():
            make(scraped.clusters[name])
    wanted = {(alert, name) for name, scene in SCENES.items() for alert in scene.faults}
    try:
        wait_until(lambda: scraped.prometheus.firing() >= wanted, "all alerts to fire")
    finally:
        firing = scraped.prometheus.firing()
        assert wanted - firing == set()
    # Half an hour of an alert is a second here, in which a busy machine does not repair all copies.
    wait_until(lambda: scraped.prometheus.firing() == wanted, "no alerts but those of the faults")


@needs_prometheus
@pytest.mark.slow
def test_every_alert_about_a_worker_fires_when_its_fault_is_made(scraped: Scraped) -> None:
    def fires(name: str) -> bool:
        return any(alert == name for alert, _ in scraped.prometheus.firing())

    cluster = scraped.healthy
    nobody = f"127.0.0.1:{free_port()}"
    with connect(nobody, retry_after_s=0.0) as client:
        repeat(
            lambda _: client.match(SPEC, ids(1)), lambda: fires("KVStoreUnreachable"), "unreachable workers"
        )
    with connect(cluster.address) as client:

        def lose_chunks(round_: int) -> None:
            document = ids(3, seed=10_000 + round_)
            put(client, document)
            match = client.match(SPEC, document)
            for watched in cluster.nodes:
                watched.node.delete(document)
            buffers = client.buffers.acquire(SPEC, match.tokens)
            client.fetch(match, buffers, None).wait()
            client.buffers.release(buffers)

        repeat(lose_chunks, lambda: fires("KVStoreFetchesFail"), "failing fetches")
    with worker(cluster) as plain:  # type: ignore[arg-type]
        answer(plain)
    with kernel(), worker(cluster) as other:  # type: ignore[arg-type]
        wait_until(lambda: answer(other) == 0 and fires("KVStoreWorkerRefused"), "refused workers")


@needs_prometheus
@pytest.mark.slow
def test_a_failing_background_loop_is_alarming(scraped: Scraped) -> None:
    """All clusters of this process have it."""

    def fail() -> None:
        raise OSError("this is a test")

    loop = BackgroundLoop("kvstore-test", fail)
    loop.start()
    try:
        wait_until(lambda: ("KVStoreBackgroundFails", HEALTHY) in scraped.prometheus.firing(), "the alert")
    finally:
        loop.stop()


@needs_prometheus
@pytest.mark.slow
def test_metrics_that_nobody_exports_are_missed(tmp_path: Path) -> None:
    with prometheus(tmp_path, {HEALTHY: free_port()}, RULES) as made:
        wait_until(lambda: ("KVStoreMetricsMissing", "") in made.firing(), "the alert")
