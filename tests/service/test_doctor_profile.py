"""What `kvstore doctor --profile` says of models that were measured, and measures itself."""

import json
from pathlib import Path

import pytest
import torch
import typer
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from kvstore_client.engines.transformers.profile import machine_of
from kvstore_client.engines.transformers.spec import spec_of
from kvstore_client.planning import CodecCost, PrefillCost, Profile, ProfileStore, profile_key
from kvstore_codec.errors import ConfigurationError
from kvstore_service.cli.doctor import doctor
from tests.client.models import tiny_model

APP = typer.Typer()
APP.command()(doctor)
_WIDE = {"COLUMNS": "240"}
_PROFILE = Profile(
    {"exact-zstd": CodecCost(50e-6, 5e-6), "medium-klt-pco": CodecCost(100e-6, 5e-6)},
    PrefillCost(0.0, 5e-4, 1e-7),
    0.75,
    1,
    {
        "model": "llama-[7b]",
        "dtype": "bfloat16",
        "kv_bytes_per_token": 20_000,
        "machine": {"processor": "Quick CPU", "device": "cpu", "torch_threads": 2},
        "measured": "2030-01-02T03:04:05+00:00",
    },
)


@pytest.fixture
def cache_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KVSTORE_CACHE_DIR", str(tmp_path))
    return tmp_path


def test_without_any_it_says_how_to_get_one(cache_dir: Path) -> None:
    result = CliRunner().invoke(APP, ["--profile"])
    assert result.exit_code == 0
    assert "--profile --model" in result.stdout
    assert json.loads(CliRunner().invoke(APP, ["--profile", "--json"]).stdout) == {"profiles": []}


def test_kept_profiles_are_listed(cache_dir: Path) -> None:
    ProfileStore(cache_dir).save("ab" * 32, _PROFILE)
    table = CliRunner().invoke(APP, ["--profile"], env=_WIDE)
    assert table.exit_code == 0, table.output
    for shown in ("llama-[7b] bfloat16", "Quick CPU, 2 threads", "2030-01-02", "0.75", "medium-klt-pco"):
        assert shown in table.stdout
    (row,) = json.loads(CliRunner().invoke(APP, ["--profile", "--json"]).stdout)["profiles"]
    assert row["key"] == "ab" * 32
    assert row["prefill_tokens_per_s"] == pytest.approx(1024 / (0.512 + 1024 * 512 * 1e-7))
    assert row["prefill_tokens_per_s_at_4096"] == pytest.approx(1024 / (0.512 + 1024 * 4608 * 1e-7))
    exact = row["encodings"][0]
    assert (exact["encoding"], exact["decode_mb_per_s"]) == ("exact-zstd", pytest.approx(400))
    assert exact["restore_mb_per_s"] == pytest.approx(4000)


def test_a_model_is_measured_when_asked_for_and_kept(
    cache_dir: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KVSTORE_ENCODING", "exact-raw")
    folder = tmp_path_factory.mktemp("model")
    model = tiny_model(dtype=torch.bfloat16)
    model.save_pretrained(folder)
    _save_tokenizer(folder)
    result = CliRunner().invoke(APP, ["--profile", "--model", str(folder), "--json"])
    assert result.exit_code == 0, result.output
    (row,) = json.loads(result.stdout)["profiles"]
    measured = {cost["encoding"] for cost in row["encodings"]}
    assert measured >= {"exact-raw", "exact-zstd", "medium-zstd"}
    assert row["prefill_tokens_per_s"] > 0
    assert set(ProfileStore(cache_dir).list()) == {row["key"]}
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    assert row["key"] == profile_key(spec_of(loaded), machine_of(loaded))
    (listed,) = json.loads(CliRunner().invoke(APP, ["--profile", "--json"]).stdout)["profiles"]
    assert listed == row


def _save_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))  # noqa: S106
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)


def test_what_is_no_model_is_said(cache_dir: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(APP, ["--profile", "--model", str(tmp_path / "nothing")])
    assert isinstance(result.exception, ConfigurationError)
    assert "nothing" in str(result.exception)
    result = CliRunner().invoke(APP, ["--model", "smollm2"])
    assert isinstance(result.exception, ConfigurationError)
    assert "--profile" in str(result.exception)
