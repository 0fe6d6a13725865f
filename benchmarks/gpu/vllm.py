"""Check vLLM's connector on an NVIDIA GPU: KV layouts, exact reuse, time to first token, and vLLM's own offloading.

    python benchmarks/gpu/vllm.py --json benchmarks/results/gpu_vllm.json

Needs a GPU and, in the environment that runs it, vLLM for GPUs and this project with its extra `bench`
(docs/engines/vllm.md). Without a GPU, it prints the reason and measures nothing.

For each connector, two OpenAI servers run on the GPU beside a store on this machine. The first one computes prompts and
stores their KV; then vLLM's own prefix cache answers them again; then the second one loads them from the store.

vllm         no connector, one server
exact        all that is stored is loaded, bit for bit, once with each KV layout: tokens before heads (NHD) and heads
             before tokens (HND). An engine starts only if a block that its own kernels write is read back
adaptive     lossy KV, of which the planner loads what is faster than computing
offloading   vLLM's OffloadingConnector and TieringOffloadingSpec, with the store as their secondary tier

Tables:

rows      as `kvstore_bench.vllm.exchange.Result.rows`, or {connector, kv_layout, failure}
memory    the KV memory that the engines have registered, as `KVMemoryInspection.kvstore_layout`
copies    copies between blocks and host memory, page-locked and not, as `KVMemoryInspection.kvstore_copies`

`exact` and `offloading` must have as many answers_same_as_own_hit as answers_compared; `exact` also same_bytes.
"""

import sys
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Annotated, Any

import typer

from kvstore_bench import write_results
from kvstore_bench.cli.tables import require_outputs, result_table
from kvstore_bench.demo.document import read_document
from kvstore_bench.models import model_folder
from kvstore_bench.output_options import JsonFile
from kvstore_bench.vllm.calibration import publish_in_process
from kvstore_bench.vllm.cli_options import LogsFolder, ModelName, VllmOptions
from kvstore_bench.vllm.engine import EngineOptions
from kvstore_bench.vllm.exchange import UNCOUNTED_PROMPTS, Result, comparable_length, measure
from kvstore_bench.vllm.http_call import RequestError
from kvstore_bench.vllm.prompts import Prompt, token_ids, windows
from kvstore_bench.vllm.script import run_script
from kvstore_bench.vllm.servers import logs_folder
from kvstore_bench.vllm.setups import NAMES, Setup, setups
from kvstore_bench.vllm.stores import KVStoreNode
from kvstore_codec.errors import ServiceError, StartupError
from kvstore_service.cli.console import output, print_table
from kvstore_service.cli.stages import Stages
from kvstore_service.doctor.machine import cuda
from kvstore_service.models import SMOLLM2

BLOCK_TOKENS = 16
"""vLLM's default on a GPU."""
STORE_BYTES = 8 << 30
COLUMNS = {
    "connector": "connector",
    "layout": "kv_layout",
    "tokens": "prompt_tokens",
    "cold s": "cold_ttft_s",
    "own hit s": "own_hit_ttft_s",
    "from store s": "store_hit_ttft_s",
    "reused": "reused_tokens",
    "as own hit": "answers_same_as_own_hit",
    "of": "answers_compared",
    "same bytes": "same_bytes",
}
COPY_COLUMNS = {name: name for name in ("kv_layout", "direction", "host_memory", "MB", "GBps", "identical")}


def main(
    model: ModelName = SMOLLM2,
    dtype: Annotated[str, typer.Option(help="Dtype of model and KV.")] = "bfloat16",
    connectors: Annotated[str, typer.Option(help="Comma-separated.")] = ",".join(NAMES),
    layouts: Annotated[str, typer.Option(help="KV layouts of `exact`, comma-separated.")] = "NHD,HND",
    tokens: Annotated[str, typer.Option(help="Lengths of prompts, comma-separated.")] = "2048,8000",
    prompts: Annotated[int, typer.Option(min=1, help="Different ones of each length.")] = 5,
    answer_tokens: Annotated[int, typer.Option(min=1, help="Length of each answer.")] = 16,
    gpu_share: Annotated[float, typer.Option(help="Part of the GPU's memory for each of two servers.")] = 0.3,
    vllm_options: VllmOptions = "",
    logs: LogsFolder = None,
    json_file: JsonFile = None,
) -> None:
    """Check vLLM's connector on this machine's GPU."""
    found = cuda()
    if not found.available:
        print(f"nothing to measure: {found.detail}")
        return
    require_outputs(json_file, None)
    folder = model_folder(model)
    lengths = [comparable_length(int(part)) for part in tokens.split(",")]
    asked = windows(token_ids(folder, read_document(None)), lengths, prompts + UNCOUNTED_PROMPTS)
    options = EngineOptions(
        folder,
        max(lengths) + answer_tokens + BLOCK_TOKENS,
        kv_cache_prompts=len(lengths) * (prompts + UNCOUNTED_PROMPTS) + 1,
        dtype=dtype,
        block_tokens=BLOCK_TOKENS,
        extra=("--gpu-memory-utilization", str(gpu_share), *vllm_options.split()),
    )
    chosen = setups(connectors, folder, layouts.split(","))
    tables: dict[str, list[dict[str, Any]]] = {"rows": [], "memory": [], "copies": []}
    with Stages(output(), {"measure": "asking pairs of servers"}) as stages, logs_folder(logs) as work:
        for number, setup in enumerate(chosen):
            stages.advance("measure", number, len(chosen))
            try:
                result = run(setup, options, work, asked, answer_tokens, number)
            except (StartupError, RequestError, ServiceError) as error:
                tables["rows"].append(setup.about | {"failure": str(error)})
                stages.note(f"{setup.label} failed: {error}")
            else:
                tables["rows"] += result.rows
                tables["copies"] += result.copies
                tables["memory"] += [setup.about | result.memory] if result.memory is not None else []
            meta = {"gpu": found.detail, "model": folder.name, "dtype": dtype, "vllm_options": vllm_options}
            write_results(tables["rows"], json_file, meta, memory=tables["memory"], copies=tables["copies"])
        stages.advance("measure", len(chosen), len(chosen))
    rows = [{"same_bytes": None} | row for row in tables["rows"] if "failure" not in row]
    for title, columns, shown in (
        ("seconds to the first token, medians", COLUMNS, rows),
        ("copies between blocks and host memory", COPY_COLUMNS, tables["copies"]),
    ):
        if shown:
            print_table(result_table(title, columns, shown))


def run(
    setup: Setup,
    options: EngineOptions,
    folder: Path,
    prompts: Mapping[int, Sequence[Prompt]],
    answer_tokens: int,
    number: int,
) -> Result:
    """Measures a setup with a store of its own, so that nothing is stored yet. Raises StartupError, RequestError and
    ServiceError."""
    with closing(KVStoreNode(None, folder, number, STORE_BYTES)) as store:
        if setup.needs_calibration:
            publish_in_process(options.model, options.dtype, store.address)
        python = Path(sys.executable)
        return measure(setup, python, options, folder, store, store.address, prompts, answer_tokens)


if __name__ == "__main__":
    run_script("gpu/vllm", main)
