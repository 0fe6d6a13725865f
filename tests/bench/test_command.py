"""`kvstore bench codec` as a user runs it."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from kvstore_client.cache_dir import default_cache_dir
from kvstore_codec.errors import ConfigurationError, UnknownEncodingError
from kvstore_service.cli.app import app
from tests.bench.commands import needs_the_demos_model, output_of


def _invoke(*arguments: str) -> None:
    CliRunner().invoke(app, ["bench", "codec", *arguments], catch_exceptions=False)


def test_a_row_that_does_not_exist_is_found_out_at_once() -> None:
    with pytest.raises(UnknownEncodingError, match="medium-klt-gzip"):
        _invoke("--rows", "exact-zstd,medium-klt-gzip")


def test_a_result_that_cannot_be_written_is_found_out_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigurationError, match="cannot write"):
        _invoke("--json", str(tmp_path / "file" / "result.json"))


def test_a_calibration_of_ones_own_needs_text_of_ones_own(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="give other text with --text"):
        _invoke("--calibration", str(tmp_path / "my.kvcal"), "--rows", "medium-klt-pco")


@pytest.mark.slow
@needs_the_demos_model
@pytest.mark.timeout(1200)
def test_quick_measures_rows_of_every_kind(tmp_path: Path) -> None:
    (tmp_path / "models").symlink_to(default_cache_dir() / "models")
    arguments = ("--quick", "--json", str(tmp_path / "result.json"), "--plot", str(tmp_path / "plot.png"))
    output_of("codec", *arguments, timeout_s=1100, KVSTORE_CACHE_DIR=str(tmp_path))
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["meta"]["command"] == "kvstore bench codec --quick --json result.json --plot plot.png"
    assert str(tmp_path) not in json.dumps(result)
    rows = {row["name"]: row for row in result["rows"]}
    exact, ours = rows["exact-zstd"], rows["medium-klt-pco"]
    assert (exact["kl"], exact["top1"], exact["restore_MBps"]) == (0, 1, None)
    assert 0 < ours["kl"] <= ours["kl_max"] < 0.1
    # Whatever the machine and however small the calibration: far below what needs none.
    assert ours["bits_per_value"] < rows["medium-zstd"]["bits_per_value"] / 2
    for row in result["rows"]:
        assert row["decode_MBps"] > 0
        assert row["encode_MBps"] > 0
        assert row["top1"] > 0.8
    assert [row["name"] for row in result["frame_overhead"]] == ["medium-klt-pco", "medium-klt-pco@256"]
    assert [row["text"] for row in result["out_of_domain"]] == ["source code"]
    assert result["out_of_domain"][0]["kl"] < 0.1
