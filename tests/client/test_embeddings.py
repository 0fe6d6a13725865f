"""Embeddings read from a checkpoint's file are those of the model that transformers loads from it."""

import os
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from kvstore_client.engines.embeddings import CheckpointEmbeddings
from kvstore_client.engines.transformers.features import embedded
from kvstore_codec.errors import CalibrationError, InvalidTokensError, UnsupportedModelError
from tests.client.models import random_prompt, tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")

TOKENS = torch.cat((random_prompt(300)[0], torch.tensor([0, 511, 0])))
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral"])
@pytest.mark.parametrize("stored", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_are_the_models(family: str, stored: torch.dtype, dtype: torch.dtype, tmp_path: Path) -> None:
    model = tiny_model(family, stored)
    model.save_pretrained(tmp_path)
    expected = embedded(model.to(dtype), TOKENS)
    assert torch.equal(CheckpointEmbeddings(tmp_path, dtype)(TOKENS), expected)


@pytest.mark.parametrize("options", [{"max_shard_size": "100KB"}, {}], ids=["shards", "whole"])
def test_they_are_found_in_any_file(options: dict[str, str], tmp_path: Path) -> None:
    model = tiny_model(tie_word_embeddings=True)
    model.save_pretrained(tmp_path, **options)
    embed = CheckpointEmbeddings(tmp_path, torch.float32)
    assert torch.equal(embed(TOKENS), embedded(model, TOKENS))
    assert embed(TOKENS[:0]).shape == (0, 64)


@pytest.mark.parametrize("token", [-1, 512])
def test_a_token_without_a_row_is_refused(token: int, tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path)
    with pytest.raises(InvalidTokensError, match="512 embeddings"):
        CheckpointEmbeddings(tmp_path, torch.float32)(torch.tensor([5, token]))


def test_a_file_that_has_changed_is_not_read(tmp_path: Path) -> None:
    """Not even one of the same size that says that it is as old as the one before it."""
    tiny_model().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    os.utime(file, ns=(1, 1))
    embed = CheckpointEmbeddings(tmp_path, torch.float32)
    other = tiny_model(seed=1)
    other.save_pretrained(tmp_path)
    os.utime(file, ns=(1, 1))
    with pytest.raises(CalibrationError, match="changed"):
        embed(TOKENS)
    assert torch.equal(CheckpointEmbeddings(tmp_path, torch.float32)(TOKENS), embedded(other, TOKENS))
    file.unlink()
    with pytest.raises(CalibrationError, match="cannot be read"):
        embed(TOKENS)


def test_a_checkpoint_without_readable_embeddings_is_refused(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    # Copies: tensors of a file that is overwritten are gone.
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    whole = file.read_bytes()
    for damaged in (b"", b"\xff" * 8, whole[:20], whole[:9] + b"[" * 999):
        file.write_bytes(damaged)
        with pytest.raises(UnsupportedModelError, match="cannot be read"):
            CheckpointEmbeddings(tmp_path, torch.float32)
    name = "model.embed_tokens.weight"
    for rows in (tensors[name].double(), None):
        tensors[name] = rows
        save_file({key: tensor for key, tensor in tensors.items() if tensor is not None}, file)
        with pytest.raises(UnsupportedModelError, match="cannot be read"):
            CheckpointEmbeddings(tmp_path, torch.float32)


def test_threads_read_at_once(tmp_path: Path) -> None:
    model = tiny_model()
    model.save_pretrained(tmp_path)
    embed, expected = CheckpointEmbeddings(tmp_path, torch.float32), embedded(model, TOKENS)
    found: list[bool] = []
    threads = [
        threading.Thread(target=lambda: found.extend(torch.equal(embed(TOKENS), expected) for _ in range(20)))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 80
