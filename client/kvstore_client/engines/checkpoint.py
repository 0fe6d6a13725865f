"""The ModelSpec of a checkpoint on disk, for processes that hold no weights or hold them fused.

A serving engine's scheduler loads no weights, and its workers fuse and shard theirs. The checkpoint's files are the
same for both, and for a transformers worker, whose `state_dict` has the same names, shapes and bytes.
"""

import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from blake3 import blake3
from safetensors import SafetensorError, safe_open

from kvstore_client.kept_file import UNUSABLE, replace_file
from kvstore_codec.errors import UnsupportedModelError
from kvstore_codec.model_config import spec_from_config
from kvstore_codec.model_spec import KVDtype, ModelSpec, streamed_weights_digest

log = logging.getLogger(__name__)

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
    is kept there and reused until a file's size or modification time changes.

    Raises UnsupportedModelError for a checkpoint that is quantised, damaged, or not in safetensors files.
    """
    if config.get("quantization_config"):
        raise UnsupportedModelError(
            f"the checkpoint in {folder} is quantised, so its weights have no bytes to name it by"
        )
    files = checkpoint_files(folder)
    tied = bool(config.get("tie_word_embeddings"))
    known = _DigestCache(cache_dir, folder, files, f"{dtype.value} tied={tied}")
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


class _DigestCache:
    """One digest in one small file, with size and time of the checkpoint's files when it was computed."""

    def __init__(self, cache_dir: Path | None, folder: Path, files: tuple[Path, ...], reading: str) -> None:
        name = blake3(f"{folder.resolve()} {reading}".encode()).hexdigest()[:32]
        self._path = None if cache_dir is None else cache_dir / "checkpoints" / f"{name}.json"
        self._files = files
        self._seen = self._look()

    def read(self) -> bytes | None:
        if self._path is None:
            return None
        try:
            kept = json.loads(self._path.read_bytes())
            digest = bytes.fromhex(kept["weights_digest"])
            return digest if kept["files"] == self._seen and len(digest) == blake3.digest_size else None
        except UNUSABLE:
            return None

    def write(self, digest: bytes) -> None:
        if self._path is None or self._look() != self._seen:  # a file was replaced meanwhile
            return
        kept = {"weights_digest": digest.hex(), "files": self._seen}
        try:
            replace_file(self._path, json.dumps(kept).encode())
        except OSError as error:
            log.info("the digest of a checkpoint is not kept: %s", error)

    def _look(self) -> dict[str, list[int]]:
        """Size in bytes and modification time in nanoseconds of each file."""
        try:
            found = {file.name: file.stat() for file in self._files}
        except (OSError, ValueError) as error:  # ValueError: a name with a NUL character
            raise UnsupportedModelError(f"the checkpoint is not whole: {error}") from error
        return {name: [stat.st_size, stat.st_mtime_ns] for name, stat in found.items()}
