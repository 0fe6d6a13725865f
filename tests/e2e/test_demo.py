"""`kvstore demo` from the outside."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

KVSTORE = Path(sys.executable).with_name("kvstore")


@pytest.mark.slow
@pytest.mark.timeout(600)
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
        timeout=560,  # the first time it makes a calibration
        check=True,
    )
    assert "through the service" in run.stdout
    result = json.loads((tmp_path / "demo.json").read_text())
    cold, hit, lossy = result["rows"]
    assert (cold["path"], cold["tokens_reused"], cold["bytes"]) == ("cold", 0, 0)
    assert (hit["path"], hit["encoding"]) == ("hit", "exact-zstd")
    assert (lossy["path"], lossy["encoding"]) == ("hit", "medium-klt-pco")
    assert lossy["tokens_reused"] == hit["tokens_reused"] == 2048
    assert lossy["bytes"] < hit["bytes"] / 20
    assert 0 < lossy["ttft_s"] < cold["ttft_s"]
    assert hit["same_tokens"] is True
    assert 0 < hit["ttft_s"] < cold["ttft_s"]
    # A link of 500 Mbit/s cannot have carried the bytes sooner than this.
    assert hit["ttft_s"] > hit["bytes"] * 8 / 500e6 * 0.9
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")
    assert "demo.trace.json" in run.stdout
    events = json.loads((tmp_path / "demo.trace.json").read_text())["traceEvents"]
    worked = {(event["pid"], event["cat"]) for event in events if event["ph"] == "X"}
    assert worked >= {(1, "compute")} | {(run, "receive") for run in (2, 3)} | {
        (run, "decode") for run in (2, 3)
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--document", "missing.txt"], "cannot read the document"),
        (["--out", "a_file/folder"], "choose another --out"),
        (["--bandwidth", "fast"], "fast"),
    ],
)
def test_what_cannot_work_is_said_at_once_in_one_line(
    tmp_path: Path, arguments: list[str], message: str
) -> None:
    (tmp_path / "a_file").touch()
    run = subprocess.run(
        [KVSTORE, "demo", *arguments], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False
    )
    assert run.returncode == 2
    assert message in run.stderr
    assert len(run.stderr.strip().splitlines()) == 1
    assert not run.stdout.strip()
