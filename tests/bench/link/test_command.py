"""`kvstore bench link` as a user runs it."""

import json
from pathlib import Path

import pytest

from tests.bench.commands import needs_the_demos_model, output_of, refuses


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("--policy", "hot"), "no policy"),
        (("--bandwidth", "fast"), "is not a bandwidth"),
        (("--jitter", "wild"), "is not a jitter pattern"),
        (("--tokens", "many"), "whole numbers"),
        (("--tokens", "1000"), "multiples of 256"),
        (("--plot", "picture.txt"), "png"),
        (("--policy", "raw", "--trace", "trace.json"), "show the adaptive policy"),
    ],
)
def test_what_cannot_be_measured_is_found_out_at_once(arguments: tuple[str, ...], reason: str) -> None:
    refuses("link", arguments, reason)


@pytest.mark.slow
@needs_the_demos_model
@pytest.mark.timeout(900)
def test_policies_take_turns_behind_a_link(tmp_path: Path) -> None:
    files = {name: tmp_path / name for name in ("result.json", "plot.png", "trace.json", "timeline.png")}
    printed = output_of(
        "link", "--bandwidth", "100mbit", "--tokens", "512", "--repeats", "1", "--floor", "high",
        "--dtype", "float32",
        "--policy", "raw,exact-zstd,adaptive", "--json", str(files["result.json"]),
        "--plot", str(files["plot.png"]),
        "--trace", str(files["trace.json"]), "--timeline", str(files["timeline.png"]), "--quick",
    )  # fmt: skip
    assert "targets of the adaptive policy" in printed
    for picture in ("plot.png", "timeline.png"):
        assert files[picture].read_bytes().startswith(b"\x89PNG")
    assert json.loads(files["trace.json"].read_text())["traceEvents"]
    result = json.loads(files["result.json"].read_text())
    assert str(tmp_path) not in json.dumps(result)
    rows = {row["policy"]: row for row in result["rows"]}
    assert set(rows) == {"cold", "raw", "exact-zstd", "adaptive"}
    assert all(row["ttft_s"] > 0 and row["tokens"] == 512 for row in rows.values())
    assert (rows["cold"]["bytes"], rows["cold"]["reused_tokens"], rows["cold"]["kl"]) == (0, 0, 0.0)
    kv_bytes = 512 * 46_080
    assert kv_bytes <= rows["raw"]["bytes"] < 1.01 * kv_bytes
    assert 0.5 * kv_bytes < rows["exact-zstd"]["bytes"] < 0.9 * kv_bytes
    for name in ("raw", "exact-zstd"):
        assert rows[name]["reused_tokens"] == 512
        assert rows[name]["kl"] < 0.005  # both only round otherwise than a prefill in one go
        assert rows[name]["ttft_s"] >= 0.95 * 8 * rows[name]["bytes"] / 100e6
    assert rows["adaptive"]["meets_floor"]
