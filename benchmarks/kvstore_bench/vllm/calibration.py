"""The calibration that lossy encodings need: the demo's small one, made once for a model and then cached.

    python -m kvstore_bench.vllm.calibration MODEL DTYPE [ADDRESS]

makes it, unless it is in the cache, and publishes it in the cluster at ADDRESS. MODEL is what `--model` of the
benchmarks takes. Benchmarks run it in a process of its own, which takes the model's memory with it.
"""

import subprocess
import sys
from pathlib import Path

from kvstore_bench.models import model_folder
from kvstore_codec.errors import StartupError

_LIMIT_S = 3600.0


def publish_in_process(model: Path, dtype: str, address: str) -> None:
    """Publishes the calibration of the model in this dtype in the cluster at `address`. Raises StartupError."""
    command = (sys.executable, "-m", __name__, str(model), dtype, address)
    try:
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=_LIMIT_S)
    except subprocess.CalledProcessError as error:
        raise StartupError(f"no calibration could be made: {error.stderr[-1000:].strip()}") from error
    except subprocess.TimeoutExpired as error:
        raise StartupError(f"a calibration took more than {_LIMIT_S:.0f} s") from error


def main(model: str, dtype: str, address: str | None = None) -> None:
    from transformers.utils import logging

    from kvstore_bench.demo.calibration import demo_calibration
    from kvstore_service.calibration import publish
    from kvstore_service.models import DType, load_model

    logging.disable_progress_bar()
    calibration, _ = demo_calibration(*load_model(str(model_folder(model)), DType(dtype)), print)
    if address is not None:
        publish.publish_calibration(calibration, address)


if __name__ == "__main__":
    main(*sys.argv[1:])
