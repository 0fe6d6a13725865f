"""docs/operate.md tells what to do about each alert, and names commands and files that exist."""

import re
from pathlib import Path

import typer.main
import yaml

from kvstore_service.cli.app import app

ROOT = Path(__file__).parents[3]
OPERATE = (ROOT / "docs" / "operate.md").read_text()


def test_every_alert_has_a_section_and_every_section_an_alert() -> None:
    rules = yaml.safe_load((ROOT / "kvstore_service/observability/files/alerts.yaml").read_text())
    alerts = [rule["alert"] for group in rules["groups"] for rule in group["rules"]]
    _, _, sections = OPERATE.partition("\n## Alerts\n")
    assert re.findall(r"^### (\w+)$", sections, flags=re.MULTILINE) == alerts


def test_its_commands_exist() -> None:
    commands = typer.main.get_group(app).commands
    used = set(re.findall(r"`(?:kv|kvstore) ([a-z]+)", OPERATE))
    assert {"drain", "quota", "status"} <= used <= commands.keys()


def test_its_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#]+)", OPERATE):
        assert (ROOT / "docs" / target).exists(), target
