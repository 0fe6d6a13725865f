"""Command-line options that all benchmarks of vLLM have."""

from pathlib import Path
from typing import Annotated

import typer

from kvstore_bench.models import QWEN
from kvstore_bench.native_dtype import NATIVE_DTYPE
from kvstore_service.models import SMOLLM2

ModelName = Annotated[
    str, typer.Option(help=f"{SMOLLM2}, {QWEN}, or a folder with a model in safetensors files.")
]
DtypeName = Annotated[str | None, typer.Option(help="Dtype of model and KV.", show_default=NATIVE_DTYPE)]
VllmOptions = Annotated[str, typer.Option(help="Further options for all vLLM servers, separated by spaces.")]
LogsFolder = Annotated[
    Path | None, typer.Option(help="Folder for the servers' logs. Default: they are deleted.")
]
