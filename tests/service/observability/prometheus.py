"""A real Prometheus: the program of that name, which scrapes every two seconds."""

import json
import shutil
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from kvstore_service.listen import Address, Reservation

PROMETHEUS, PROMTOOL = shutil.which("prometheus"), shutil.which("promtool")
needs_prometheus = pytest.mark.skipif(
    PROMETHEUS is None or PROMTOOL is None,
    reason="there is no `prometheus` on PATH: apt-get install prometheus; PyPI has no package of it",
)
_WAIT_S = 120.0


def free_port() -> int:
    reservation = Reservation(Address("127.0.0.1", 0))
    reservation.release()
    return reservation.address.port


class Prometheus:
    def __init__(self, url: str) -> None:
        self._url = url

    def query(self, expression: str) -> list[dict[str, Any]]:
        """The series of an instant query, without those whose value is not a number."""
        found: list[dict[str, Any]] = self._get("query", query=expression)["result"]
        return [series for series in found if series["value"][1] != "NaN"]

    def firing(self) -> set[tuple[str, str]]:
        """(name, label `cluster`) of every alert that fires."""
        alerts = self._get("alerts")["alerts"]
        return {
            (alert["labels"]["alertname"], alert["labels"].get("cluster", ""))
            for alert in alerts
            if alert["state"] == "firing"
        }

    def rules_health(self) -> set[str]:
        """Errors in the evaluation of rules."""
        groups = self._get("rules")["groups"]
        return {rule.get("lastError", "") for group in groups for rule in group["rules"]} - {""}

    def _get(self, what: str, **parameters: str) -> Any:
        url = f"{self._url}/api/v1/{what}?{urllib.parse.urlencode(parameters)}"
        try:
            with urllib.request.urlopen(url, timeout=10) as answer:  # noqa: S310 (http)
                return json.load(answer)["data"]
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{parameters}: {error.read().decode()}") from error


@contextmanager
def prometheus(folder: Path, targets: Mapping[str, int], rules: Path) -> Iterator[Prometheus]:
    """Scrapes the ports in `targets`, whose series get the label `cluster`, and evaluates a file of rules. Alerts fire
    one second after their condition holds."""
    content = yaml.safe_load(rules.read_text())
    for group in content["groups"]:
        for rule in group["rules"]:
            rule["for"] = "1s"
    (folder / "rules.yaml").write_text(yaml.safe_dump(content))
    configuration = {
        "global": {"scrape_interval": "2s", "scrape_timeout": "2s", "evaluation_interval": "1s"},
        "rule_files": [str(folder / "rules.yaml")],
        "scrape_configs": [
            {
                "job_name": "kvstore",
                "static_configs": [
                    {"targets": [f"127.0.0.1:{port}"], "labels": {"cluster": name}}
                    for name, port in targets.items()
                ],
            }
        ],
    }
    (folder / "prometheus.yml").write_text(yaml.safe_dump(configuration))
    address = f"127.0.0.1:{free_port()}"
    assert PROMETHEUS is not None
    with (folder / "prometheus.log").open("wb") as log:
        process = subprocess.Popen(
            [
                PROMETHEUS,
                f"--config.file={folder / 'prometheus.yml'}",
                f"--storage.tsdb.path={folder / 'tsdb'}",
                f"--web.listen-address={address}",
            ],
            stdout=log,
            stderr=log,
        )
    try:
        wait_until(lambda: _is_ready(address), "Prometheus to start")
        yield Prometheus(f"http://{address}")
    finally:
        process.terminate()
        process.wait()


def wait_until(condition: Callable[[], object], what: str) -> None:
    deadline_s = time.monotonic() + _WAIT_S
    while not condition():
        assert time.monotonic() < deadline_s, f"waited for {what} in vain"
        time.sleep(0.2)


def _is_ready(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"http://{address}/-/ready", timeout=5):
            return True
    except OSError:
        return False
