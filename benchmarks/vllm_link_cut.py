"""The link between vLLM and the store is cut in the middle of a load.

    python benchmarks/vllm_link_cut.py --json F

For each policy: how long that request takes, how long other requests to the same engine, of which nothing is stored,
take meanwhile, and how soon KV is reused when the link is back. Needs what vllm_ttft.py needs. Rows have link,
prompt_tokens and the fields of `kvstore_bench.vllm.link_cut.cut_row`; a policy that failed before the cut has policy
and failure only.
"""

from typing import Annotated, Any

import typer

from kvstore_bench import write_results
from kvstore_bench.cli.tables import require_outputs, result_table
from kvstore_bench.demo.document import calibration_text, read_document
from kvstore_bench.models import model_folder
from kvstore_bench.native_dtype import native_dtype
from kvstore_bench.output_options import JsonFile
from kvstore_bench.vllm.cli_options import DtypeName, LogsFolder, ModelName, VllmOptions
from kvstore_bench.vllm.engine import EngineOptions
from kvstore_bench.vllm.http_call import RequestError
from kvstore_bench.vllm.link_cut import cut_row, run_cut
from kvstore_bench.vllm.options import Options
from kvstore_bench.vllm.policies import COLD, DEFAULT_POLICIES, peer_versions, policies_named
from kvstore_bench.vllm.prompts import token_ids, windows
from kvstore_bench.vllm.run import Bench, Measured
from kvstore_bench.vllm.script import run_script
from kvstore_bench.vllm.servers import servers_behind_a_link
from kvstore_service.bandwidth import parse_bandwidth
from kvstore_service.cli.console import output, print_table
from kvstore_service.cli.stages import Stages
from kvstore_service.models import SMOLLM2

_STAGES = {"start": "starting vLLM servers", "store": "storing the prompt's KV", "cut": "cutting the link"}
_COLUMNS = {
    "policy": "policy",
    "cold s": "cold_ttft_s",
    "hit s": "hit_ttft_s",
    "cut at s": "cut_after_s",
    "this request s": "cut_request_ttft_s",
    "others before s": "unrelated_before_ttft_s",
    "while it waits s": "unrelated_waiting_ttft_s",
    "most": "unrelated_waiting_ttft_max_s",
    "afterwards s": "unrelated_after_ttft_s",
    "failed": "unrelated_failed",
    "reuse back after s": "reuse_back_after_s",
}
_FILLER_TOKENS, _FILLERS = 300, 1000


def main(
    model: ModelName = SMOLLM2,
    dtype: DtypeName = None,
    policies: Annotated[str, typer.Option(help="Comma-separated.")] = ",".join(DEFAULT_POLICIES),
    link: Annotated[str, typer.Option(help="Bandwidth of the link before and after the cut.")] = "200mbit",
    tokens: Annotated[int, typer.Option(help="Length of the prompt.")] = 2000,
    share: Annotated[float, typer.Option(help="Share of the load's bytes before the cut.")] = 0.25,
    cut_s: Annotated[
        float,
        typer.Option(help="Least seconds of the cut, which ends after the request."),
    ] = 45.0,
    repeats: Annotated[int, typer.Option(min=1, help="Cuts for each policy, with another prompt each.")] = 1,
    vllm_options: VllmOptions = "",
    logs: LogsFolder = None,
    json_file: JsonFile = None,
) -> None:
    require_outputs(json_file, None)
    dtype = dtype or native_dtype()
    folder = model_folder(model)
    bandwidth_bps = parse_bandwidth(link)
    options = Options(folder, folder.name, [bandwidth_bps], [tokens], 1, repeats + 1, 1)
    versions = peer_versions()
    chosen = policies_named(policies)
    prompts = windows(token_ids(folder, read_document(None)), options.tokens, options.texts)
    text = token_ids(folder, calibration_text())
    fillers = iter(windows(text, [_FILLER_TOKENS], _FILLERS)[_FILLER_TOKENS])
    rows: list[dict[str, Any]] = []
    engine = EngineOptions(folder, tokens + 128, dtype=dtype, extra=tuple(vllm_options.split()))
    with (
        Stages(output(), _STAGES) as stages,
        servers_behind_a_link(chosen, engine, stages, logs) as (network, started),
    ):
        running, measured = started.running, Measured(left_out=started.left_out)
        cold = running[COLD]
        Bench(options, network, running, prompts, stages, lambda _: None, measured).prepare()
        network.set_bandwidth(bandwidth_bps)
        steps = [(prompt, name) for prompt in prompts[tokens][1:] for name in running if name != COLD]
        for number, (prompt, name) in enumerate(steps):
            stages.advance("cut", number, len(steps))
            cold.forget()
            cold_s = cold.completions.complete(prompt.ids, 1, options.silence_s).ttft_s
            try:
                run = run_cut(running[name], network, prompt, fillers, share, cut_s)
            except RequestError as error:
                rows.append({"policy": name, "failure": str(error)})
            else:
                rows.append({"link": link, "prompt_tokens": tokens, **cut_row(name, run, cold_s)})
            write_results(
                rows,
                json_file,
                {
                    "model": folder.name,
                    "dtype": dtype,
                    "cut_s": cut_s,
                    "left_out": measured.left_out,
                    "peer_versions": versions,
                },
            )
        stages.advance("cut", len(steps), len(steps))
    shown = [row for row in rows if "cold_ttft_s" in row]
    if shown:
        print_table(result_table("the link was cut in the middle of a load", _COLUMNS, shown))
    for name, why in measured.left_out.items():
        print(f"without {name}: {why}")


if __name__ == "__main__":
    run_script("vllm_link_cut", main)
