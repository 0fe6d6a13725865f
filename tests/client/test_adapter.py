"""A LoRA adapter on disk is named by what it computes."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from kvstore_client.engines import adapter as module
from kvstore_client.engines.adapter import AdapterFiles, read_adapter
from kvstore_codec.errors import UnsupportedModelError
from tests.client.adapters import adapter_tensors, saved_adapter


def digest(folder: Path, dtype: torch.dtype = torch.float32, **options: Any) -> bytes:
    return read_adapter(str(folder), dtype, options.pop("settings", {}), **options).digest


def test_copies_are_one_adapter_wherever_they_lie_and_come_from(tmp_path: Path) -> None:
    first = saved_adapter(tmp_path / "first", 1, base_model_name_or_path="/models/a", peft_version="0.17")
    second = saved_adapter(tmp_path / "second", 1, base_model_name_or_path="hub/a", peft_version="0.18")
    tensors = dict(reversed(adapter_tensors(1).items()))
    save_file(tensors, second / "adapter_model.safetensors", metadata={"saved": "elsewhere"})
    assert digest(first) == digest(second)


def test_all_that_changes_what_it_computes_changes_its_name(tmp_path: Path) -> None:
    folder = saved_adapter(tmp_path / "adapter", 1)
    found = [
        digest(folder),
        digest(folder, torch.bfloat16),
        digest(folder, settings={"target_modules": ["q_proj"]}),
        digest(saved_adapter(tmp_path / "other", 2)),
        digest(saved_adapter(tmp_path / "alpha", 1, lora_alpha=16)),
        digest(saved_adapter(tmp_path / "rs", 1, use_rslora=True)),
    ]
    assert len(set(found)) == len(found)


def test_the_digest_is_kept_until_a_file_changes(tmp_path: Path) -> None:
    folder, cache = saved_adapter(tmp_path / "adapter", 1), tmp_path / "cache"
    first = digest(folder, cache_dir=cache)
    (kept,) = (cache / "adapters").iterdir()
    kept.write_text(json.dumps(json.loads(kept.read_text()) | {"weights_digest": "07" * 32}))
    assert digest(folder, cache_dir=cache) != first, "so it was read from there"
    saved_adapter(folder, 1)
    assert digest(folder, cache_dir=cache) == first


def test_other_weights_with_size_and_time_of_the_first_ones_are_not_taken_for_them(tmp_path: Path) -> None:
    """As tools leave them that unpack files with a fixed time."""
    folder, cache = saved_adapter(tmp_path / "adapter", 1), tmp_path / "cache"
    os.utime(folder / "adapter_model.safetensors", ns=(1, 1))
    first, files = digest(folder, cache_dir=cache), AdapterFiles.of(str(folder))
    saved_adapter(folder, 2)
    os.utime(folder / "adapter_model.safetensors", ns=(1, 1))
    assert digest(folder, cache_dir=cache) != first
    assert AdapterFiles.of(str(folder)) != files


def test_an_adapter_that_is_replaced_while_it_is_read_has_no_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, hashed = saved_adapter(tmp_path, 1), module.streamed_weights_digest

    def replaced(*arguments: Any) -> bytes:
        found = hashed(*arguments)
        saved_adapter(folder, 2)
        return found

    monkeypatch.setattr(module, "streamed_weights_digest", replaced)
    with pytest.raises(UnsupportedModelError, match="replaced while"):
        digest(folder)


@pytest.mark.parametrize("config", ["", "[]", "{", "[" * 9999, '{"a": "' + "b" * (1 << 20) + '"}'], ids=len)
def test_a_configuration_that_is_none_is_refused(config: str, tmp_path: Path) -> None:
    folder = saved_adapter(tmp_path, 1)
    (folder / "adapter_config.json").write_text(config)
    with pytest.raises(UnsupportedModelError, match="cannot be read"):
        digest(folder)


def test_damaged_and_missing_files_are_refused(tmp_path: Path) -> None:
    weights = saved_adapter(tmp_path, 1) / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(UnsupportedModelError, match="cannot be read"):
        digest(tmp_path)
    weights.rename(tmp_path / "adapter_model.bin")
    with pytest.raises(UnsupportedModelError, match="cannot be read"):
        digest(tmp_path)
    for name in (tmp_path / "nowhere", Path("a\0b")):
        with pytest.raises(UnsupportedModelError, match="cannot be read"):
            digest(name)
