"""`kvstore demo` from the outside."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
KVSTORE = Path(sys.executable).with_name("kvstore")


def test_the_demo_shows_a_hit_with_the_same_answer(tmp_path: Path) -> None:
    run = subprocess.run(
        [
            KVSTORE,
            "demo",
            "--bandwidth",
            "500mbit",
            "--document-tokens",
            "2100",
            "--new-tokens",
            "8",
            "--out",
            tmp_path,
        ],
        capture_output=True,
        text=True,
        timeout=280,
        check=True,
    )
    assert "through the service" in run.stdout
    result = json.loads((tmp_path / "demo.json").read_text())
    cold, hit = result["rows"]
    assert (cold["path"], cold["tokens_reused"], cold["bytes"]) == ("cold", 0, 0)
    assert hit["path"] == "hit"
    assert hit["tokens_reused"] == 2048
    assert hit["same_tokens"] is True
    assert 0 < hit["ttft_s"] < cold["ttft_s"]
    # A link of 500 Mbit/s cannot have carried the bytes sooner than this.
    assert hit["ttft_s"] > hit["bytes"] * 8 / 500e6 * 0.9
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")


def test_a_document_that_is_not_there_is_one_clear_line(tmp_path: Path) -> None:
    run = subprocess.run(
        [KVSTORE, "demo", "--document", tmp_path / "missing.txt"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert run.returncode == 1
    assert "cannot read the document" in run.stderr
    assert "Traceback" not in run.stderr
