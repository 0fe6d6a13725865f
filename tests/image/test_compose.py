"""image/compose.yaml: a cluster with Prometheus and Grafana on a laptop."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import typer.main
import yaml

from kvstore_service.cli.app import app
from kvstore_service.listen import Address
from kvstore_service.security import Security
from kvstore_service.settings import Settings, load_settings
from tests.image.dockerfile import IMAGE, PINNED, project
from tests.service.observability.prometheus import PROMTOOL, needs_prometheus

COMPOSE = yaml.safe_load((IMAGE / "compose.yaml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
RULES = "/etc/prometheus/alerts.yaml"


def mounts(service: str) -> dict[str, str]:
    """What is mounted, by its path in the container."""
    return {
        target: source for source, target in (mount.split(":")[:2] for mount in SERVICES[service]["volumes"])
    }


def mounted_file(service: str, target: str) -> Path:
    return IMAGE / mounts(service)[target]


def served() -> Settings:
    """The settings of the service, as `kvstore serve` reads them."""
    command, *words = SERVICES["kvstore"]["command"].split()
    assert command == "serve"
    flags: dict[str, object] = {}
    for number, word in enumerate(words):
        if word.startswith("--"):
            following = words[number + 1] if number + 1 < len(words) else "--"
            name = word.removeprefix("--").replace("-", "_")
            flags[name] = True if following.startswith("--") else following
    return load_settings(**flags)


@pytest.mark.parametrize("service", SERVICES)
def test_a_service_is_reached_from_this_machine_alone(service: str) -> None:
    assert all(port.startswith("127.0.0.1:") for port in SERVICES[service]["ports"])
    assert "network_mode" not in SERVICES[service]


@pytest.mark.parametrize("service", SERVICES)
def test_images_are_pinned_and_mounts_exist(service: str) -> None:
    assert PINNED.fullmatch(SERVICES[service]["image"])
    for source in mounts(service).values():
        assert (IMAGE / source).is_file() if source.startswith(".") else source in COMPOSE["volumes"]


def test_the_service_accepts_its_flags_and_keeps_chunks_on_a_volume() -> None:
    settings = served()
    Security.of_cluster(settings).require_for(Address.parse(settings.listen), settings)
    assert str(settings.data_dir) in mounts("kvstore")
    ports = {port.rpartition(":")[2] for port in SERVICES["kvstore"]["ports"]}
    assert ports == {str(Address.parse(settings.listen).port), str(settings.metrics_port)}
    assert SERVICES["kvstore"]["image"] == f"kvstore:{project()['version']}"


def test_the_health_check_is_a_command() -> None:
    _, command, probe, address = SERVICES["kvstore"]["healthcheck"]["test"]
    assert command == "kvstore"
    assert probe in typer.main.get_group(app).commands
    assert Address.parse(address).port == Address.parse(served().listen).port


def test_prometheus_scrapes_the_service_and_loads_its_alerts() -> None:
    config = yaml.safe_load(mounted_file("prometheus", "/etc/prometheus/prometheus.yml").read_text())
    assert config["rule_files"] == [RULES]
    assert yaml.safe_load(mounted_file("prometheus", RULES).read_text())["groups"]
    (job,) = config["scrape_configs"]
    assert job["static_configs"] == [{"targets": [f"kvstore:{served().metrics_port}"]}]


@needs_prometheus
def test_prometheus_accepts_its_files(tmp_path: Path) -> None:
    config = mounted_file("prometheus", "/etc/prometheus/prometheus.yml").read_text()
    file = tmp_path / "prometheus.yml"
    file.write_text(config.replace(RULES, str(mounted_file("prometheus", RULES))))
    subprocess.run([str(PROMTOOL), "check", "config", file], check=True, capture_output=True, timeout=60)


def test_grafana_finds_prometheus_and_the_dashboard() -> None:
    found = mounts("grafana")
    (provisioning,) = {str(Path(path).parent.parent) for path in found if path.endswith(".yaml")}
    sources = yaml.safe_load(mounted_file("grafana", f"{provisioning}/datasources/kvstore.yaml").read_text())
    (source,) = sources["datasources"]
    assert source["url"] == "http://prometheus:" + SERVICES["prometheus"]["ports"][0].rpartition(":")[2]
    assert source["isDefault"]
    dashboards = yaml.safe_load(
        mounted_file("grafana", f"{provisioning}/dashboards/kvstore.yaml").read_text()
    )
    (provider,) = dashboards["providers"]
    dashboard = mounted_file("grafana", provider["options"]["path"] + "/kvstore.json")
    assert json.loads(dashboard.read_text())["panels"]
