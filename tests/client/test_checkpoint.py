"""A checkpoint on disk names the model that transformers loads from it."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from kvstore_client.engines.checkpoint import spec_of_checkpoint
from kvstore_client.engines.transformers.spec import spec_of
from kvstore_codec.errors import UnsupportedModelError
from kvstore_codec.model_spec import KVDtype, ModelSpec
from tests.client.models import FAMILIES, tiny_model

Saved = Callable[..., Path]


def saved(folder: Path, family: str = "llama", dtype: torch.dtype = torch.float32, **options: object) -> Path:
    tiny_model(family).to(dtype).save_pretrained(folder, **options)
    return folder


def named(folder: Path, dtype: KVDtype = KVDtype.FLOAT32, cache_dir: Path | None = None) -> ModelSpec:
    config = AutoConfig.from_pretrained(folder).to_dict()
    return spec_of_checkpoint(folder, config, dtype, cache_dir=cache_dir)


def loaded(folder: Path, dtype: KVDtype = KVDtype.FLOAT32) -> ModelSpec:
    return spec_of(AutoModelForCausalLM.from_pretrained(folder, dtype=dtype.torch))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_the_name_of_the_loaded_model(family: str, tmp_path: Path) -> None:
    folder = saved(tmp_path, family)
    assert named(folder) == loaded(folder)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", list(KVDtype))
def test_weights_are_named_as_they_are_loaded(stored: torch.dtype, dtype: KVDtype, tmp_path: Path) -> None:
    folder = saved(tmp_path, dtype=stored)
    assert named(folder, dtype) == loaded(folder, dtype)


def test_shards_are_one_checkpoint(tmp_path: Path) -> None:
    whole, shards = saved(tmp_path / "whole"), saved(tmp_path / "shards", max_shard_size="100KB")
    assert len(list(shards.glob("*.safetensors"))) > 1
    assert named(shards) == named(whole) == loaded(shards)


def test_tied_embeddings_are_named_once_stored_or_not(tmp_path: Path) -> None:
    model = tiny_model("llama", tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    without = named(tmp_path)
    assert without == loaded(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    assert "lm_head.weight" not in tensors
    tensors["lm_head.weight"] = torch.zeros_like(tensors["model.embed_tokens.weight"])
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert named(tmp_path) == without


def test_frequencies_that_old_checkpoints_hold_do_not_count(tmp_path: Path) -> None:
    before = named(saved(tmp_path))
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert named(tmp_path) == before == loaded(tmp_path)


def test_one_changed_value_is_another_model(tmp_path: Path) -> None:
    before = named(saved(tmp_path))
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.2.mlp.up_proj.weight"][3, 5] += 1
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert named(tmp_path) != before


def test_the_digest_is_kept_until_a_file_changes(tmp_path: Path) -> None:
    folder, cache = saved(tmp_path / "model"), tmp_path / "cache"
    first = named(folder, cache_dir=cache)
    (kept,) = (cache / "checkpoints").iterdir()
    made_up = json.loads(kept.read_text()) | {"weights_digest": "07" * 32}
    kept.write_text(json.dumps(made_up))
    assert named(folder, cache_dir=cache).weights_digest == b"\x07" * 32  # so it was read from there
    os.utime(folder / "model.safetensors", ns=(1, 1))
    assert named(folder, cache_dir=cache) == first


def test_other_weights_with_size_and_time_of_the_first_ones_are_not_taken_for_them(tmp_path: Path) -> None:
    """As tools leave them that unpack files with a fixed time."""
    folder, cache = saved(tmp_path / "model"), tmp_path / "cache"
    os.utime(folder / "model.safetensors", ns=(1, 1))
    first = named(folder, cache_dir=cache)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.2.mlp.up_proj.weight"] += 1
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    os.utime(folder / "model.safetensors", ns=(1, 1))
    assert named(folder, cache_dir=cache) != first


@pytest.mark.parametrize(
    "damage", ["", "{", '{"weights_digest": "zz"}', '{"weights_digest": 7}', "[]", "[" * 9999]
)
def test_a_damaged_note_is_not_believed(damage: str, tmp_path: Path) -> None:
    folder, cache = saved(tmp_path / "model"), tmp_path / "cache"
    first = named(folder, cache_dir=cache)
    (kept,) = (cache / "checkpoints").iterdir()
    kept.write_text(damage)
    assert named(folder, cache_dir=cache) == first


def test_other_dtypes_of_one_checkpoint_are_kept_apart(tmp_path: Path) -> None:
    folder, cache = saved(tmp_path / "model"), tmp_path / "cache"
    specs = [named(folder, dtype, cache) for dtype in (KVDtype.FLOAT32, KVDtype.BFLOAT16) * 2]
    assert specs[:2] == specs[2:]
    assert specs[0].weights_digest != specs[1].weights_digest


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path: Path) -> None:
    folder = saved(tmp_path / "model")
    (tmp_path / "cache").write_text("a file")
    assert named(folder, cache_dir=tmp_path / "cache") == named(folder)


def test_what_is_no_checkpoint_is_refused_by_name(tmp_path: Path) -> None:
    folder = saved(tmp_path / "model")
    config = AutoConfig.from_pretrained(folder).to_dict()
    with pytest.raises(UnsupportedModelError, match="quantised"):
        spec_of_checkpoint(folder, config | {"quantization_config": {"bits": 4}}, KVDtype.FLOAT32)
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:-100])
    with pytest.raises(UnsupportedModelError, match="cannot be read"):
        spec_of_checkpoint(folder, config, KVDtype.FLOAT32)
    (folder / "model.safetensors").unlink()
    with pytest.raises(UnsupportedModelError, match="save_pretrained"):
        spec_of_checkpoint(folder, config, KVDtype.FLOAT32)
    for index in (
        "[" * 9999,
        '{"weight_map": {"a": "../elsewhere.safetensors"}}',
        '{"weight_map": {"a": "gone"}}',
        '{"weight_map": {"a": "a\\u0000b"}}',
    ):
        (folder / "model.safetensors.index.json").write_text(index)
        with pytest.raises(UnsupportedModelError):
            spec_of_checkpoint(folder, config, KVDtype.FLOAT32)
