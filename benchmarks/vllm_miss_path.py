"""What the connector costs vLLM where it finds nothing: time to first token and decoding speed.

    python benchmarks/vllm_miss_path.py --json F

Four servers answer prompts that none of them has seen, in turns: without a connector, with a store that has none of the
prompts, the same with a lossy encoding, and with a store out of reach. Needs what vllm_ttft.py needs, but no peer. Rows
are those of `kvstore_bench.vllm.miss_path.miss_rows`.
"""

import time
from typing import Annotated

import typer

from kvstore_bench import write_results
from kvstore_bench.cli.tables import require_outputs, result_table
from kvstore_bench.demo.document import calibration_text
from kvstore_bench.models import model_folder
from kvstore_bench.native_dtype import native_dtype
from kvstore_bench.output_options import JsonFile
from kvstore_bench.vllm.cli_options import DtypeName, LogsFolder, ModelName, VllmOptions
from kvstore_bench.vllm.completions import Answer
from kvstore_bench.vllm.engine import EngineOptions
from kvstore_bench.vllm.miss_path import MISS_POLICIES, miss_rows
from kvstore_bench.vllm.policies import peer_versions, policies_named
from kvstore_bench.vllm.prompts import token_ids, windows
from kvstore_bench.vllm.script import run_script
from kvstore_bench.vllm.servers import servers_behind_a_link
from kvstore_service.cli.console import output, print_table
from kvstore_service.cli.stages import Stages
from kvstore_service.models import SMOLLM2

_STAGES = {"start": "starting vLLM servers", "ask": "asking"}
_COLUMNS = {
    "policy": "policy",
    "TTFT s": "ttft_s",
    "least": "ttft_min_s",
    "most": "ttft_max_s",
    "x cold": "ttft_over_cold",
    "tokens/s": "decode_tokens_per_s",
    "decoding x cold": "decode_time_over_cold",
    "of": "rounds",
}
_PAUSE_S = 2.0
"""Pause after each answer. Its KV is still being stored, which would slow down the next server."""
_WARM_UP, _SILENCE_S = 2, 240.0


def main(
    model: ModelName = SMOLLM2,
    dtype: DtypeName = None,
    policies: Annotated[str, typer.Option(help="Comma-separated.")] = ",".join(MISS_POLICIES),
    tokens: Annotated[int, typer.Option(help="Length of the prompts.")] = 2000,
    answer_tokens: Annotated[int, typer.Option(min=2, help="Length of each answer.")] = 64,
    rounds: Annotated[int, typer.Option(min=1)] = 15,
    vllm_options: VllmOptions = "",
    logs: LogsFolder = None,
    json_file: JsonFile = None,
) -> None:
    require_outputs(json_file, None)
    dtype = dtype or native_dtype()
    folder = model_folder(model)
    versions = peer_versions()
    chosen = policies_named(policies, MISS_POLICIES)
    text = token_ids(folder, calibration_text())
    prompts = windows(text, [tokens], rounds + _WARM_UP)[tokens]
    answers: dict[str, list[Answer]] = {}
    engine = EngineOptions(
        folder, tokens + answer_tokens + 128, dtype=dtype, extra=tuple(vllm_options.split())
    )
    with (
        Stages(output(), _STAGES) as stages,
        servers_behind_a_link(chosen, engine, stages, logs) as (_, started),
    ):
        running, left_out = started.running, started.left_out
        for number, prompt in enumerate(prompts):
            stages.advance("ask", number, len(prompts))
            turn = number % len(running)
            for name in (*list(running)[turn:], *list(running)[:turn]):
                answer = running[name].completions.complete(prompt.ids, answer_tokens, _SILENCE_S)
                time.sleep(_PAUSE_S)
                if number >= _WARM_UP:
                    answers.setdefault(name, []).append(answer)
            if answers:
                meta = {
                    "model": folder.name,
                    "dtype": dtype,
                    "prompt_tokens": tokens,
                    "answer_tokens": answer_tokens,
                }
                write_results(
                    miss_rows(answers), json_file, meta | {"left_out": left_out, "peer_versions": versions}
                )
        stages.advance("ask", len(prompts), len(prompts))
    print_table(result_table("nothing is reused", _COLUMNS, miss_rows(answers)))
    for name, why in left_out.items():
        print(f"without {name}: {why}")


if __name__ == "__main__":
    run_script("vllm_miss_path", main)
