"""Start workers for canary_starts.py: each loads a model in a given way and compares its KV with the canary.

    echo '{"address": "127.0.0.1:7420", "model": "llama", "dtype": "float32", ...}' | python benchmarks/canary_start.py

For each line of standard input, the script forks a process, after the imports and before any computation. The process
prints a line of JSON: {reason, message, difference, tolerance, layer, kind, probe_s, reused_tokens, ...}.
"""

import json
import os
import sys
import time
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.utils import logging

from kvstore_client import connect
from kvstore_client.engines.transformers import CachedModel
from kvstore_service.models import load_smollm2
from tests.client.models import random_prompt, tiny_model

PROMPT_TOKENS = 300


def loaded(name: str, dtype: torch.dtype) -> PreTrainedModel:
    """Loads SmolLM2, or makes a tiny random model of the family `name`."""
    return load_smollm2(dtype)[0] if name == "smollm2" else tiny_model(name, dtype)


def run_worker(start: dict[str, Any]) -> dict[str, Any]:
    """Runs one worker: compares its model with the canary, then answers a prompt. Returns the measurements."""
    logging.disable_progress_bar()
    torch.set_num_threads(start["threads"])
    model = loaded(start["model"], getattr(torch, start["dtype"]))
    model.set_attn_implementation(start["attention"])
    with connect(start["address"], fetch_policy="fixed", canary_timeout_s=500) as client:
        if start["compile"]:
            # Hooks that come later would not be compiled in.
            model.forward = torch.compile(model.forward, backend=start["compile"])
        cached = CachedModel(model, client)
        begin_s = time.perf_counter()
        reason = cached.canary.refusal(cached.spec, wait_s=500)
        probe_s = time.perf_counter() - begin_s
        verdict = cached.canary.verdict
        found = verdict.comparison if verdict is not None else None
        cached.generate(random_prompt(PROMPT_TOKENS), max_new_tokens=1, do_sample=False)
        client.store.flush()
        cached.close()
    return {
        "reason": reason,
        "message": verdict.message if verdict is not None else "",
        "difference": found.difference if found is not None else None,
        "tolerance": found.tolerance if found is not None else None,
        "layer": found.layer if found is not None else None,
        "kind": found.kind if found is not None else None,
        "probe_s": round(probe_s, 3),
        "reused_tokens": cached.last_report.reused_tokens,
        "bypassed": cached.last_report.bypassed,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }


def main() -> None:
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            print(json.dumps(run_worker(json.loads(line))), flush=True)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if status:
            sys.exit(f"this start failed: {line}")


if __name__ == "__main__":
    main()
