"""vLLM with the connector, in a process of its own, with the engine and its worker in further ones.

Importing vLLM takes longer than all the rest of an engine's start. So it is imported once, by the process that engines
are forked off.
"""

import multiprocessing
import os
import time
from collections.abc import Mapping, Sequence
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
import vllm.model_executor.models.llama
import vllm.v1.engine.core
import vllm.v1.worker.cpu_worker  # noqa: F401  # what the engine's processes need
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest

from kvstore_bench.vllm.worker_extension import KVMemoryInspection
from tests.vllm.processes import Prompt

BLOCK_TOKENS = 128


def block_digests(_: object) -> list[str]:
    """Digests of all blocks of a worker. Runs in the worker's process."""
    return KVMemoryInspection().kvstore_block_digests()


def add_hook(worker: Any) -> None:
    """Steer the model a little, as a forward hook may. Runs in the worker's process."""
    model = worker.model_runner.get_model()
    model.model.layers[1].mlp.register_forward_hook(lambda _module, _inputs, output: output * 1.1)


def counts(_: object) -> dict[str, int]:
    """What a worker has counted, when everything is stored that it was given. Runs in the worker's process."""
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    client = get_kv_transfer_group()._client
    client.store.flush()
    snapshot: dict[str, int] = client.metrics.snapshot()
    return snapshot


class Engine:
    def __init__(self, model: str, connector: dict[str, Any] | None, **options: Any) -> None:
        transfer = None
        if connector is not None:
            transfer = {
                "kv_connector": "KVStoreConnector",
                "kv_connector_module_path": "kvstore_client.engines.vllm",
                "kv_role": "kv_both",
                "kv_load_failure_policy": "recompute",
                "kv_connector_extra_config": connector,
            }
        sizes = {"max_model_len": 4096, "max_num_seqs": 8, "block_size": BLOCK_TOKENS}
        self._llm = LLM(
            model,
            skip_tokenizer_init=True,
            enforce_eager=True,
            kv_transfer_config=transfer,
            disable_log_stats=False,
            **(sizes | {"dtype": "float32"} | options),
        )
        self._engine = self._llm.llm_engine

    def generate(
        self,
        prompts: Sequence[Prompt],
        salts: Sequence[str | None] = (),
        max_tokens: int = 8,
        logprobs: int | None = None,
        adapter: Sequence[Any] | None = None,
        *,
        scores: bool = False,
    ) -> dict[str, Any]:
        """Generated tokens, how many tokens of each prompt were not computed, log-probabilities of that many likely
        first tokens, and, where `scores` are wanted, those of the tokens of each prompt from its second one on.

        A prompt is a list of tokens, or an array of their embeddings, `[tokens, hidden_size]`. `adapter` is name,
        number and path of a LoRA adapter."""
        asked = [_asked(prompt) for prompt in prompts]
        for prompt, salt in zip(asked, salts, strict=False):
            if salt is not None:
                prompt["cache_salt"] = salt
        lora = LoRARequest(*adapter) if adapter is not None else None
        sampling = _greedy(max_tokens, logprobs, prompt_logprobs=1 if scores else None)
        outputs = self._llm.generate(asked, sampling, use_tqdm=False, lora_request=lora)
        firsts = [output.outputs[0].logprobs[0] for output in outputs] if logprobs else []
        return {
            "logprobs": [{token: found.logprob for token, found in first.items()} for first in firsts],
            "tokens": [list(output.outputs[0].token_ids) for output in outputs],
            "cached": [output.num_cached_tokens for output in outputs],
            "scores": [_scores(output) for output in outputs] if scores else [],
        }

    def abort(self, prompt: Sequence[int], after_s: float) -> dict[str, Any]:
        """Begin a request and abort it."""
        self._engine.add_request("aborted", {"prompt_token_ids": list(prompt)}, _greedy(1000))
        time.sleep(after_s)
        self._engine.abort_request(["aborted"])
        return {"unfinished": self._engine.has_unfinished_requests()}

    def load_adapter(self, adapter: Sequence[Any], *, in_place: bool = False) -> dict[str, Any]:
        """Load a LoRA adapter, as vLLM's server does before it takes requests for one."""
        return {"done": self._engine.add_lora(LoRARequest(*adapter, load_inplace=in_place))}

    def forget(self) -> dict[str, Any]:
        """Empty the engine's own prefix cache."""
        return {"done": self._llm.reset_prefix_cache()}

    def blocks(self) -> dict[str, Any]:
        return {"digests": self._llm.collective_rpc(block_digests)[0]}

    def preemptions(self) -> dict[str, float]:
        """How often a request has lost its blocks to another one, since the engine was started."""
        found = [m for m in self._llm.get_metrics() if m.name == "vllm:num_preemptions"]
        return {"count": sum(metric.value for metric in found)}

    def steer(self) -> dict[str, Any]:
        """Have the engine compute other KV from now on."""
        self._llm.collective_rpc(add_hook)
        return {}

    def counts(self) -> dict[str, int]:
        found: dict[str, int] = self._llm.collective_rpc(counts)[0]
        return found

    def resources(self) -> dict[str, int]:
        """Threads and file descriptors of all processes of the engine."""
        processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
        return {
            "threads": sum(process.num_threads() for process in processes),
            "descriptors": sum(process.num_fds() for process in processes),
        }

    def close(self) -> None:
        self._engine.engine_core.shutdown()


def _asked(prompt: Prompt) -> Any:
    if isinstance(prompt, np.ndarray):
        return {"prompt_embeds": torch.from_numpy(prompt)}
    return {"prompt_token_ids": list(prompt)}


def _greedy(
    max_tokens: int, logprobs: int | None = None, prompt_logprobs: int | None = None
) -> SamplingParams:
    return SamplingParams(
        max_tokens=max_tokens,
        temperature=0,
        ignore_eos=True,
        detokenize=False,
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
    )


def _scores(output: Any) -> list[float]:
    """Log-probabilities of the prompt's tokens from its second one on."""
    found = zip(output.prompt_token_ids, output.prompt_logprobs, strict=True)
    return [likely[token].logprob for token, likely in found if likely is not None]


def serve(options: Mapping[str, Any], environment: Mapping[str, str], log: Path, asked: Connection) -> None:
    """Answer each command with what the method of that name returns, until the other end is closed."""
    os.environ.update(environment)
    with log.open("ab", buffering=0) as file:
        for output in (1, 2):
            os.dup2(file.fileno(), output)
    # On a CPU, vLLM would start fresh interpreters, because threads of its kernels do not survive a fork. There are
    # none yet, and so the engine's further processes need not import everything again.
    multiprocessing.get_context = partial(_forking, multiprocessing.get_context)  # type: ignore[assignment]
    engine = Engine(**options)
    asked.send({"ready": True})
    while True:
        try:
            command = asked.recv()
        except EOFError:
            break
        asked.send(getattr(engine, command.pop("do"))(**command))
    engine.close()


def _forking(contexts: Any, method: str | None = None) -> Any:
    return contexts("fork" if method == "spawn" else method)
