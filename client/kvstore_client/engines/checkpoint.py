"""The ModelSpec of a checkpoint on disk, for processes that hold no weights or hold them fused.

A serving engine's scheduler loads no weights, and its workers fuse and shard theirs. The checkpoint's files are the
same for both, and for a transformers worker, whose `state_dict` has the same names, shapes and bytes.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from kvstore_client.engines.kept_digest import KeptDigest
from kvstore_codec.errors import UnsupportedModelError
from kvstore_codec.model_config import spec_from_config
from kvstore_codec.model_spec import KVDtype, ModelSpec, streamed_weights_digest

_WHOLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
EMBEDDINGS, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
_NOT_LOADED = ".rotary_emb.inv_freq"
"""Suffix of tensors in old checkpoints that models compute instead of loading."""


def spec_of_checkpoint(
    folder: Path,
    config: Mapping[str, Any],
    dtype: KVDtype,
    *,
    model_id: str | None = None,
    cache_dir: Path | None = None,
) -> ModelSpec:
    """The ModelSpec of the checkpoint in `folder` with its weights loaded as `dtype`. It equals the one that
    `kvstore_client.engines.transformers` gives the loaded model.

    `config` is the Hugging Face config with its defaults filled in (`AutoConfig.from_pretrained(folder).to_dict()`).
    Reading the weights takes about a second per 2 GB, with one tensor in memory at a time. With `cache_dir` the digest
    is kept there and reused until a file changes.

    Raises UnsupportedModelError for a checkpoint that is quantised, damaged, or not in safetensors files.
    """
    if config.get("quantization_config"):
        raise UnsupportedModelError(
            f"the checkpoint in {folder} is quantised, so its weights have no bytes to name it by"
        )
    files = checkpoint_files(folder)
    tied = bool(config.get("tie_word_embeddings"))
    place = None if cache_dir is None else cache_dir / "checkpoints"
    known = KeptDigest(place, folder, files, f"{dtype.value} tied={tied}")
    digest = known.read()
    if digest is None:
        digest = _digest(folder, files, dtype.torch, tied=tied)
        known.write(digest)
    return spec_from_config(config, weights_digest=digest, dtype=dtype, model_id=model_id)


def checkpoint_files(folder: Path) -> tuple[Path, ...]:
    """The checkpoint's safetensors files. Raises UnsupportedModelError when there are none."""
    try:
        if (folder / _WHOLE).is_file():
            return (folder / _WHOLE,)
        names = set(json.loads((folder / _INDEX).read_bytes())["weight_map"].values())
        files = tuple(folder / name for name in sorted(names))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UnsupportedModelError(
            f"{folder} has neither {_WHOLE} nor a readable {_INDEX} ({error}); save the model with save_pretrained"
        ) from error
    for file in files:
        if file.parent != folder:
            raise UnsupportedModelError(f"{folder / _INDEX} names {file}, which lies outside its folder")
    return files


def _digest(folder: Path, files: tuple[Path, ...], dtype: torch.dtype, *, tied: bool) -> bytes:
    with ExitStack() as opened:
        try:
            sources = {name: file for file in files for name, file in _named(opened, file)}
            if tied:
                sources[_HEAD] = sources[EMBEDDINGS]

            def load(name: str) -> torch.Tensor:
                tensor: torch.Tensor = sources[name].get_tensor(
                    EMBEDDINGS if tied and name == _HEAD else name
                )
                return tensor.to(dtype) if tensor.is_floating_point() else tensor

            return streamed_weights_digest(sources, load)
        except (OSError, SafetensorError, KeyError) as error:
            raise UnsupportedModelError(f"the checkpoint in {folder} cannot be read: {error}") from error


def _named(opened: ExitStack, path: Path) -> Iterator[tuple[str, Any]]:
    file = opened.enter_context(safe_open(path, framework="pt", device="cpu"))
    for name in file.keys():  # noqa: SIM118  # not a mapping
        if not name.endswith(_NOT_LOADED):
            yield name, file
