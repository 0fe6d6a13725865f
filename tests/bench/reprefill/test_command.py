"""`kvstore bench reprefill` as a user runs it."""

import json
from pathlib import Path

import pytest

from tests.bench.commands import needs_the_demos_model, output_of, refuses


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("--system", "best"), "no system"),
        (("--budget", "some"), "numbers from 0 to 1"),
        (("--budget", "1.5"), "up to 1"),
        (("--disk", "tape"), "no disk"),
        (("--tokens", "1000"), "not two or more chunks"),
        (("--plot", "picture.txt"), "png"),
    ],
)
def test_what_cannot_be_measured_is_found_out_at_once(arguments: tuple[str, ...], reason: str) -> None:
    refuses("reprefill", arguments, reason)


@pytest.mark.slow
@needs_the_demos_model
@pytest.mark.timeout(900)
def test_questions_are_asked_on_a_balanced_disk(tmp_path: Path) -> None:
    files = {name: tmp_path / name for name in ("result.json", "plot.png")}
    systems = ("contiguous", "contiguous-no-cache", "contiguous-16", "impress", "full", "cold")
    printed = output_of(
        "reprefill", "--quick", "--system", ",".join(systems), "--budget", ".25", "--disk", "balanced",
        "--questions", "3", "--dtype", "float32",
        "--json", str(files["result.json"]), "--plot", str(files["plot.png"]),
    )  # fmt: skip
    assert "targets of re-prefill" in printed
    assert files["plot.png"].read_bytes().startswith(b"\x89PNG")
    result = json.loads(files["result.json"].read_text())
    assert str(tmp_path) not in json.dumps(result)
    rows = {row["system"]: row for row in result["rows"]}
    assert tuple(rows) == systems
    rate = rows["impress"]["disk_bandwidth_Bps"]
    assert rate == result["meta"]["disk_bandwidth_Bps"]["balanced"] > 0
    for name, row in rows.items():
        assert (
            row["p95_s"]
            >= row["ttft_s"]
            >= (0 if name in ("cold", "full") else row["bytes_needed"] / rate / 8)
        )
        assert (row["prefix_tokens"], row["disk"]) == (1024, "balanced")
    assert rows["contiguous-16"]["encoding"] == "exact-zstd@16x2"
    assert rows["contiguous"]["tokens_read"] <= 256 < rows["full"]["tokens_read"] == 1024
    assert rows["contiguous-no-cache"]["cache_hit_rate"] == 0
    assert rows["contiguous-no-cache"]["kl"] == pytest.approx(rows["contiguous"]["kl"], rel=0.05)
    assert {found["system"] for found in result["speedups"]} == set(systems) - {"contiguous"}


@pytest.mark.slow
@needs_the_demos_model
@pytest.mark.timeout(900)
def test_a_run_that_takes_too_long_keeps_its_rows(tmp_path: Path) -> None:
    output_of(
        "reprefill", "--quick", "--system", "contiguous", "--budget", ".25,.5", "--questions", "3",
        "--minutes", "0.0001", "--json", str(tmp_path / "result.json"),
    )  # fmt: skip
    assert len(json.loads((tmp_path / "result.json").read_text())["rows"]) == 1
