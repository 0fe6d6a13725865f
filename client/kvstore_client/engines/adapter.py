"""LoRA adapters on disk, in PEFT's format: what one computes, whatever an engine calls it."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from kvstore_client.engines.file_version import FileVersion, file_version
from kvstore_client.engines.kept_digest import KeptDigest
from kvstore_codec import canonical
from kvstore_codec.errors import UnsupportedModelError
from kvstore_codec.model_spec import streamed_weights_digest

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

_DOMAIN = b"kvstore adapter 1"
_MOST_CONFIG_BYTES = 1 << 20
_FOR_PEOPLE = ("base_model_name_or_path", "inference_mode", "peft_version", "revision")
"""Keys of an adapter's configuration that say where it comes from and how it was saved."""


@dataclass(frozen=True, slots=True)
class AdapterFiles:
    """The files of an adapter as a look at them shows them: where these are equal, so is what is in the files."""

    folder: str
    versions: tuple[FileVersion, ...]
    """Of configuration and weights."""

    @classmethod
    def of(cls, folder: str) -> "AdapterFiles":
        """Raises OSError where a file is missing, and ValueError for a name that no file can have."""
        return cls(folder, tuple(file_version(Path(folder, name).stat()) for name in (CONFIG, WEIGHTS)))


@dataclass(frozen=True, slots=True)
class Adapter:
    """An adapter that was read."""

    digest: bytes
    """32 bytes, of all that decides what the adapter computes."""
    files: AdapterFiles
    """What the digest is of."""


def read_adapter(
    folder: str, dtype: torch.dtype, settings: Mapping[str, Any], cache_dir: Path | None = None
) -> Adapter:
    """The adapter in `folder` as an engine uses it that loads its weights as `dtype`. `settings` are what else decides
    what the engine makes of the files. Reads all of them; with `cache_dir` the digest of the weights is kept there and
    reused until a file changes.

    Raises UnsupportedModelError for an adapter that is damaged, not in safetensors files, or replaced meanwhile.
    """
    path = Path(folder)
    weights = path / WEIGHTS
    try:
        seen = AdapterFiles.of(folder)
        config = _config(path / CONFIG)
        known = KeptDigest(
            None if cache_dir is None else cache_dir / "adapters", path, (weights,), f"{dtype}"
        )
        digest = known.read()
        if digest is None:
            with safe_open(weights, framework="pt", device="cpu") as file:
                digest = streamed_weights_digest(
                    file.keys(),
                    lambda name: _loaded(file.get_tensor(name), dtype),
                )
            known.write(digest)
        is_replaced = AdapterFiles.of(folder) != seen
    except (OSError, ValueError, TypeError, AttributeError, RecursionError, SafetensorError) as error:
        raise UnsupportedModelError(f"the adapter in {folder} cannot be read: {error}") from error
    if is_replaced:
        raise UnsupportedModelError(f"the adapter in {folder} was replaced while it was read")
    told = json.dumps([config, settings], sort_keys=True).encode()
    return Adapter(canonical.digest(_DOMAIN, told, digest), seen)


def _config(path: Path) -> dict[str, Any]:
    """What the configuration says about what the adapter computes. Raises OSError and ValueError."""
    with path.open("rb") as file:
        data = file.read(_MOST_CONFIG_BYTES + 1)
    config = json.loads(data) if len(data) <= _MOST_CONFIG_BYTES else None
    if not isinstance(config, dict):
        raise ValueError(f"{path} holds no configuration")  # noqa: TRY004  # of files, not of arguments
    return {name: value for name, value in config.items() if name not in _FOR_PEOPLE}


def _loaded(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() else tensor
