"""The rendered containers start for real, as processes of this machine, and do what their manifests promise."""

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kvstore_bench.pods.release import Release
from kvstore_client import connect
from kvstore_client.pages import PageNamespace

pytestmark = pytest.mark.slow

_DISK = {"size": "256Mi", "volume": {"size": "300Mi"}}
SMALL: dict[str, Any] = {"storage": {"replicas": 2, "memory": "64Mi", "disk": _DISK}}
KUBERAY = SMALL | {"mode": "kuberay"}
PLAIN: dict[str, Any] = {
    "insecure": True,
    "tls": {"source": "disabled"},
    "auth": {"enabled": False},
    "redis": {"mode": "none"},
    "gateway": {"persistence": {"enabled": True}},
    "chunks": {"replicas": 1},
    "storage": {"replicas": 1, "memory": "64Mi", "disk": {"enabled": False}},
}
KEYS = [b"%d" % number for number in range(40)]
PAGES = [random.Random(number).randbytes(50_000) for number in range(40)]


@pytest.fixture(params=[SMALL, KUBERAY, PLAIN], ids=["statefulset", "kuberay", "plain"])
def release(request: pytest.FixtureRequest, short_folder: Path) -> Iterator[Release]:
    with Release(short_folder, request.param) as made:
        made.start_all()
        yield made


@pytest.mark.timeout(600)
def test_the_pods_serve_workers_and_pass_their_probes_and_the_charts_own_test(release: Release) -> None:
    for kind in ("startup", "readiness", "liveness"):
        assert {name: pod.probe(kind) for name, pod in release.pods.items()} == dict.fromkeys(
            release.pods, True
        )
    with connect(**release.client_settings()) as worker:
        store = worker.pages(PageNamespace(b"a model", "bytes", 0, 1))
        assert all(store.put(KEYS, PAGES).ok)
        views = [bytearray(len(page)) for page in PAGES]
        assert all(store.get_into(KEYS, views).ok)
        assert views == PAGES
    refuse_strangers(release)
    status, text = release.run("test")
    assert status == 0, text
    assert "read back in" in text
    look_for_secrets(release)
    release.pod("storage").kill()
    assert not release.pod("storage").probe("liveness")


def refuse_strangers(release: Release) -> None:
    settings = release.client_settings()
    if "token_file" not in settings:
        return
    wrong = Path(settings["token_file"]).with_name("wrong")
    wrong.write_text("kvs_0000000000000000_wrong")
    with connect(**settings | {"token_file": str(wrong)}) as stranger:
        assert not any(stranger.pages(PageNamespace(b"a model", "bytes", 0, 1)).put(KEYS, PAGES).ok)


def look_for_secrets(release: Release) -> None:
    """None of them is in what the pods have written."""
    logs = "".join(pod.log.read_text(errors="replace") for pod in release.pods.values())
    for manifest in release.manifests.of("Secret"):
        for key, value in release.manifests.files("Secret", manifest["metadata"]["name"]).items():
            if key in ("auth_token", "password", "tls.key") or key.endswith("-token"):
                assert value.decode() not in logs, key


@pytest.mark.timeout(600)
def test_restarts_of_pods_lose_nothing_and_clients_find_nearly_all(short_folder: Path) -> None:
    from benchmarks.rolling_restart import measure

    rows, _ = measure(short_folder, pages=200, readers=2, steady_s=2, pause_s=0.1, quick=True)
    assert {row["phase"]: (row["failed_fetches"], row["fetches"] > 0) for row in rows} == {
        row["phase"]: (0, True) for row in rows
    }
    assert min(row["hit_rate"] for row in rows) > 0.99
    assert rows[-1]["lost_pages"] == 0
    assert rows[-1]["hit_rate"] == rows[0]["hit_rate"] == 1.0
