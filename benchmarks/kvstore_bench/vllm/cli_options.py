"""Command-line options that all benchmarks of vLLM have."""

from pathlib import Path
from typing import Annotated

import typer

from kvstore_bench.vllm.models import QWEN
from kvstore_service.models import SMOLLM2

ModelName = Annotated[
    str, typer.Option(help=f"{SMOLLM2}, {QWEN}, or a folder with a model in safetensors files.")
]
DtypeName = Annotated[
    str, typer.Option(help="bfloat16, or float32: sooner on CPUs without instructions for bfloat16.")
]
VllmOptions = Annotated[str, typer.Option(help="Further options of all vLLM servers.")]
LogsFolder = Annotated[Path | None, typer.Option(help="Folder that keeps the servers' logs.")]
