"""`kvstore bench recompute` as a user runs it."""

import json
from pathlib import Path

import pytest

from tests.bench.commands import needs_the_demos_model, output_of, refuses


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("--selector", "best"), "no selector"),
        (("--selector", "hkvd-nodrift"), "only focus"),
        (("--ratio", "some"), "numbers from 0 to 1"),
        (("--ratio", "1.5"), "between 0 and 1"),
        (("--tier", "tape"), "no tier"),
        (("--tokens", "1000"), "a multiple of"),
        (("--plot", "picture.txt"), "png"),
    ],
)
def test_what_cannot_be_measured_is_found_out_at_once(arguments: tuple[str, ...], reason: str) -> None:
    refuses("recompute", arguments, reason)


@pytest.mark.slow
@needs_the_demos_model
@pytest.mark.timeout(900)
def test_documents_are_reused_from_memory_and_from_a_slow_disk(tmp_path: Path) -> None:
    files = {name: tmp_path / name for name in ("result.json", "plot.png")}
    printed = output_of(
        "recompute", "--quick", "--selector", "focus,first_k", "--tier", "dram,hdd",
        "--json", str(files["result.json"]), "--plot", str(files["plot.png"]),
    )  # fmt: skip
    assert "fidelity, documents" in printed
    assert "targets of reuse" not in printed  # one prompt of each kind shows nothing
    assert files["plot.png"].read_bytes().startswith(b"\x89PNG")
    result = json.loads(files["result.json"].read_text())
    assert str(tmp_path) not in json.dumps(result)
    rows = {
        (row["kind"], row["selector"], row["ratio"], row["tier"]): row
        for row in result["rows"]
        if not row["tuned"]
    }
    assert len(rows) == 2 * 2 * 3 * 2
    for kind in ("text", "documents"):
        none, some, everything = (rows[kind, "focus", ratio, "dram"] for ratio in (0, 0.15, 1))
        assert none["kl"] > some["kl"] > everything["kl"]
        assert everything["kl"] < 1e-5
        assert (everything["closed"], everything["top1"]) == (pytest.approx(1, abs=1e-3), 1.0)
        assert (none["exact_tokens"], none["approximate_tokens"], none["recomputed_tokens"]) == (512, 512, 0)
        assert some["recomputed_tokens"] == 76
        assert everything["prefilled"] or everything["recomputed_tokens"] == 512
        # What first_k computes again need not be read, frames being whole.
        assert rows[kind, "first_k", 1, "dram"]["bytes"] < rows[kind, "first_k", 0, "dram"]["bytes"]
        slow = rows[kind, "focus", 0, "hdd"]
        assert slow["ttft_s"] >= slow["bytes"] / 160e6
    assert {row["tier"] for row in result["tuned"]} == {"dram", "hdd"}
    assert all(0.15 <= row["ratio"] <= 1 for row in result["tuned"])
    assert result["targets"] == []
