"""The status page: what it is told, and what a browser shows of it."""

import base64
import json
import re
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from wsgiref.util import setup_testing_defaults

import pytest

from kvstore_api.v1 import kvstore_pb2 as pb
from kvstore_client import connect, request_scope
from kvstore_codec.errors import ServiceError
from kvstore_service.cluster_stats import cluster_stats
from kvstore_service.identity import Scope
from kvstore_service.listen import Address
from kvstore_service.metrics_server import metrics_endpoint
from kvstore_service.observability import FILES
from kvstore_service.observability.status_page import StatusPage
from tests.client.chunks import ids
from tests.service.observability.screenshots import (
    MANY_NODES,
    browser,
    dumped,
    made_up_models,
    made_up_stats,
)
from tests.service.observability.watched import fetch, put, watched_cluster
from tests.service.secured import SecuredCluster

needs_browser = pytest.mark.skipif(
    browser() is None, reason="there is no Chromium on PATH: apt-get install chromium"
)


def answer(page: StatusPage, path: str = "/status.json") -> tuple[dict[str, str], bytes]:
    told: list[Any] = []
    environ: dict[str, Any] = {}
    setup_testing_defaults(environ)
    environ["PATH_INFO"] = path
    body = b"".join(page(environ, lambda status, headers: told.append((status, dict(headers)))))
    ((status, headers),) = told
    assert status == "200 OK"
    return headers, body


def told(page: StatusPage) -> dict[str, Any]:
    data: dict[str, Any] = json.loads(answer(page)[1])
    return data


def test_the_page_tells_of_a_real_cluster(tmp_path: Path) -> None:
    page = StatusPage()
    assert told(page)["state"] == "starting"
    with watched_cluster(tmp_path) as cluster:

        def look() -> None:
            page.observe(cluster.address, lambda: cluster_stats(cluster.address), lambda: {"models": []})

        look()
        with connect(cluster.address, tenant="acme") as client, request_scope("order-1"):
            document = ids(4)
            assert put(client, document) == 4
            assert fetch(client, document) == 4
        look()
        data = told(page)
        overview = data["overview"]
        assert data["state"] == "running"
        assert overview["health"] == "good"
        assert overview["sentence"] == "All is well: 2 storage nodes answer."
        assert overview["hit_rate"] == 1
        assert overview["out_Bps"] > 0
        assert [tenant["name"] for tenant in overview["tenants"]] == ["acme"]
        assert {row["tier"] for row in overview["stored_bytes"]} == {"memory", "disk"}
        assert len(data["history"]) == 2
        (reported,) = data["fetches"]
        assert (reported["request_id"], reported["tenant"]) == ("order-1", "acme")
        assert (reported["chunks"], reported["delivered"]) == (4, 4)
        assert "receive" in {span["stage"] for span in reported["spans"]}
        assert all(0 <= span["start_s"] <= span["end_s"] for span in reported["spans"])
        cluster.nodes[1].stop_serving()
        look()
        overview = told(page)["overview"]
        assert overview["health"] == "warning"
        assert "node-1 does not answer" in overview["sentence"]

    def lost() -> pb.ClusterStatsReply:
        raise ServiceError("gone")

    page.observe(cluster.address, lost)
    assert (told(page)["state"], told(page)["error"]) == ("lost", "gone")


def test_a_client_does_not_report_every_fetch(tmp_path: Path) -> None:
    with watched_cluster(tmp_path, nodes=1) as cluster:
        with connect(cluster.address) as client:
            document = ids(1)
            put(client, document)
            for _ in range(5):
                assert fetch(client, document) == 1
        assert len(cluster_stats(cluster.address).fetches) == 1


def test_the_page_needs_no_network_and_allows_nothing_else() -> None:
    headers, body = answer(StatusPage(), "/")
    text = body.decode()
    assert text == (FILES / "status.html").read_text()
    assert not re.search(r"https?://(?!www\.w3\.org/)", text)
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write", text)
    policy = headers["Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; connect-src 'self';")
    assert "unsafe" not in policy


@pytest.fixture
def secured(tmp_path: Path) -> Iterator[SecuredCluster]:
    cluster = SecuredCluster(tmp_path)
    yield cluster
    cluster.close()


def test_the_page_is_for_those_who_may_read_metrics(secured: SecuredCluster, unused_port: int) -> None:
    def status(path: str, authorization: str) -> int:
        asked = urllib.request.Request(
            f"http://127.0.0.1:{unused_port}{path}", headers={"Authorization": authorization}
        )
        try:
            with urllib.request.urlopen(asked, timeout=10) as reply:  # noqa: S310 (http)
                return int(reply.status)
        except urllib.error.HTTPError as error:
            error.close()
            return error.code

    def basic(token: str) -> str:
        return "Basic " + base64.b64encode(f"anybody:{token}".encode()).decode()

    reader, worker = secured.token(None, Scope.METRICS), secured.token("acme", Scope.DATA)
    with metrics_endpoint(Address("127.0.0.1", unused_port), secured.security, StatusPage()):
        for path in ("/", "/status.json", "/metrics"):
            assert status(path, f"Bearer {reader}") == 200
            assert status(path, basic(reader)) == 200
            assert status(path, basic(worker)) == 403
            assert status(path, basic("")) == 401
            assert status(path, "Basic %%%") == 401
            assert status(path, "") == 401


Serve = Callable[[pb.ClusterStatsReply, dict[str, Any]], str]


@pytest.fixture
def serve(unused_port: int) -> Iterator[Serve]:
    """Serves the page of an answer of the coordinator, and returns its address."""
    page = StatusPage()
    with metrics_endpoint(Address("127.0.0.1", unused_port), page=page):

        def shown(reply: pb.ClusterStatsReply, models: dict[str, Any]) -> str:
            for _ in range(3):
                page.observe("kvstore:7420", lambda: reply, lambda: models)
            return f"http://127.0.0.1:{unused_port}/"

        yield shown


@needs_browser
@pytest.mark.slow
def test_a_browser_shows_a_hundred_nodes(serve: Serve) -> None:
    text = dumped(serve(made_up_stats(MANY_NODES), made_up_models()))
    assert "node-99" in text
    assert "lack a replica" in text
    assert "Recent fetches" in text
    assert "smollm2" in text
    assert "<script>alert" not in text.replace("<script>\n", "")


@needs_browser
@pytest.mark.slow
def test_a_browser_shows_a_cluster_without_nodes(serve: Serve) -> None:
    text = dumped(serve(pb.ClusterStatsReply(epoch=1), {}))
    assert "The cluster has no storage node" in text
    assert "There is no storage node." in text


@needs_browser
@pytest.mark.slow
def test_names_are_shown_as_text(serve: Serve) -> None:
    reply = made_up_stats(2)
    reply.fetches[0].request_id = "<img src=x onerror=document.title='hacked'>"
    text = dumped(serve(reply, {}))
    assert "&lt;img src=x" in text
    assert "<title>hacked" not in text
