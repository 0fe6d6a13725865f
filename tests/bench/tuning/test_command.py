"""`kvstore tune` as a user runs it, also by its former name."""

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from kvstore_bench.tuning.tune import MOST_RATIO
from kvstore_client.engines.transformers.spec import spec_of
from kvstore_client.recompute.tuned import TunedRatios
from kvstore_client.recompute.tuning import initial_ratio
from kvstore_codec.errors import ConfigurationError, UnsupportedModelError
from kvstore_service.cli.app import app
from tests.client.models import tiny_model


@pytest.fixture(autouse=True)
def cache_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KVSTORE_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def saved_model(folder: Path, family: str = "llama") -> Path:
    """In transformers format, with a tokenizer of one token a byte."""
    tiny_model(family).save_pretrained(folder)
    letters = {letter: number for number, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(letters, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_each_tier_has_its_ratio_then(tmp_path: Path, cache_dir: Path) -> None:
    folder, data_dir = saved_model(tmp_path / "model"), tmp_path / "data"
    data_dir.mkdir()
    result, picture = tmp_path / "result.json", tmp_path / "plot.png"
    done = CliRunner().invoke(
        app,
        [
            "tune", "--model", str(folder), "--tier", "disk,hdd,dram", "--tokens", "1024",
            "--selector", "first_k", "--no-drift", "--repeats", "1", "--sweep", "3", "--data-dir", str(data_dir),
            "--model-id", "tiny",
            "--json", str(result), "--plot", str(picture),
        ],
        catch_exceptions=False,
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert "tuned for first_k, without drift, 1024 tokens reused" in done.output
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert not list(data_dir.iterdir())
    written = json.loads(result.read_text())
    assert (written["meta"]["selector"], written["meta"]["drift"]) == ("first_k", False)
    rows = {row["tier"]: row for row in written["rows"]}
    assert list(rows) == ["dram", "hdd", "disk"]
    spec = spec_of(tiny_model(), "tiny")
    # Stored as it is, noise is hardly compressed.
    assert rows["hdd"]["transfer_s"] >= 0.8 * spec.kv_bytes_per_token / 160e6
    kept = TunedRatios(cache_dir).load(spec.digest)
    for tier, row in rows.items():
        assert row["first_ratio"] == pytest.approx(
            initial_ratio(row["compute_s"], row["transfer_s"], MOST_RATIO)
        )
        assert row["ratio"] == kept[tier].ratio
        assert [tuple(point) for point in row["measured"]] == list(kept[tier].measurements)
        assert row["first_ratio"] == row["measured"][0][0]
        assert [ratio for ratio, _ in row["sweep"]] == pytest.approx([0.15, 0.375, 0.6])
        assert row["over_best"] == row["ttft_s"] / min(seconds for _, seconds in row["sweep"])


@pytest.mark.slow
@pytest.mark.parametrize("name", [("tune",), ("calibrate", "--ratio")], ids=" ".join)
@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("--tier", "tape"), "no tier"),
        (("--selector", "best"), "no selector"),
        (("--tokens", "1000"), "a multiple of"),
        (("--tokens", "8192"), "too long for the model, which supports 8192"),
        (("--data-dir", "nowhere"), "nowhere"),
        (("--plot", "picture.txt"), "png"),
    ],
)
def test_what_cannot_be_tuned_is_found_out_at_once(
    tmp_path: Path, name: tuple[str, ...], arguments: tuple[str, ...], reason: str
) -> None:
    command = [*name, "--model", str(saved_model(tmp_path / "model")), *arguments]
    with pytest.raises(ConfigurationError, match=reason):
        CliRunner().invoke(app, command, catch_exceptions=False)


def test_a_model_whose_text_is_reused_only_where_it_stood(tmp_path: Path) -> None:
    command = ["tune", "--model", str(saved_model(tmp_path / "model", "gemma3"))]
    with pytest.raises(UnsupportedModelError):
        CliRunner().invoke(app, command, catch_exceptions=False)


@pytest.mark.parametrize(
    ("arguments", "option"),
    [
        (("--text", "a.txt", "--out", "a", "--tier", "dram"), "--tier"),
        (("--no-drift",), "--drift"),
        (("--ratio", "--text", "a.txt"), "--text"),
        (("--ratio", "--publish", "127.0.0.1:1"), "--publish"),
        (("--ratio", "--rank", "0"), "--rank"),
    ],
)
def test_options_of_one_thing_are_not_taken_for_the_other(arguments: tuple[str, ...], option: str) -> None:
    done = CliRunner().invoke(app, ["calibrate", "--model", "smollm2", *arguments])
    assert done.exit_code == 2
    assert f"for {option}: " in done.output
    assert "--ratio" in done.output
