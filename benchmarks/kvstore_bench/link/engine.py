"""The measured process: a model, and a client for each policy, connected over the shaped links.

`python -m kvstore_bench.link.engine`; see `orders`.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import DynamicCache, PreTrainedModel
from transformers.utils import logging

from kvstore_bench.first_token import FirstTokenTimer
from kvstore_bench.link.clients import connect_policy
from kvstore_bench.link.orders import Answers, serve
from kvstore_bench.link.policies import Policy, policies_named
from kvstore_bench.link.prefill import cachegen_file
from kvstore_bench.link.prompts import Prompt, prompts, sources
from kvstore_bench.link.stream import ByteStream
from kvstore_bench.timeline_plot import TracedRun, plot_timelines
from kvstore_client import KVStoreClient
from kvstore_client.engines.transformers import CachedModel
from kvstore_client.spans import STAGES
from kvstore_client.timeline import Timeline
from kvstore_codec.encoding import Rate
from kvstore_service.models import load_smollm2

ANSWER_TOKENS = 16


@dataclass(frozen=True, slots=True)
class _Answered:
    """Result and measurements of one answered question."""

    output: Any
    timeline: Timeline
    ttft_s: float
    reused_tokens: int
    received_bytes: int
    encodings: tuple[str, ...] = ()
    replans: int = 0


@dataclass(frozen=True, slots=True)
class _Reference:
    """Predictions of the model after its own KV."""

    tokens: tuple[int, ...]
    log_probabilities: torch.Tensor
    """f32 `[continuation, vocabulary]`"""


class _Engine:
    """Executes the orders of the benchmark. `load` comes first."""

    def __init__(self) -> None:
        self._prompts: dict[int, Prompt] = {}
        self._models: dict[str, CachedModel] = {}
        self._policies: dict[str, Policy] = {}
        self._references: dict[int, _Reference] = {}
        self._decoded: dict[int, dict[str, torch.Tensor]] = {}
        self._last: dict[str, TracedRun] = {}

    def load(
        self,
        address: str,
        routes: dict[str, str],
        dtype: str,
        tokens: list[int],
        policies: list[str],
        floor: str | None,
        adaptive: dict[str, Any],
        cachegen_folder: str | None,
        cachegen_bytes: list[int],
        source: str,
    ) -> None:
        """Loads the model, the prompts and a client for each policy. `cachegen_bytes` has the size of each document as
        CacheGen codes it, in the order of `tokens`. `source` is the address of the ByteSource."""
        self._model: PreTrainedModel
        self._model, tokenizer = load_smollm2(getattr(torch, dtype))
        self._prompts = prompts(sources()[0], tokenizer, tokens)
        rate = Rate(floor) if floor else None
        self._policies = {policy.name: policy for policy in policies_named(policies, rate, adaptive)}
        for name, policy in self._policies.items():
            if policy.settings:
                self._models[name] = self._connected(
                    connect_policy(address, {**policy.settings, "routes": routes})
                )
        if cachegen_folder is not None:
            self._decoded = {length: load_file(cachegen_file(cachegen_folder, length)) for length in tokens}
            self._sizes = dict(zip(tokens, cachegen_bytes, strict=True))
            self._stream = ByteStream(routes.get(source, source))
        for prompt in self._prompts.values():  # warms up: the first forward passes of a process are slow
            self._cold(prompt.ids.flip(1), 1)

    def _connected(self, client: KVStoreClient) -> CachedModel:
        """The model with this client. The clients are used one after the other, so they share buffers. Closing each
        earlier model removes its hooks: a second set of hooks would record every key twice."""
        for other in self._models.values():
            client.buffers = other.client.buffers
            other.close()
        cached = CachedModel(self._model, client, store=False)
        client.prepare(cached.spec).result()
        # Finish the comparison with the canary now, because closing the model would abort it. A model that was not
        # compared reuses nothing.
        cached.canary.refusal(cached.spec, wait_s=client.settings.timeouts.canary_s)
        return cached

    def measure(self, policy: str, tokens: int, judge: bool) -> dict[str, Any]:
        """Asks the question with a policy. With `judge`, also measures the fidelity of the delivered KV, untimed."""
        prompt, kind = self._prompts[tokens], self._policies[policy].kind
        new_tokens = ANSWER_TOKENS if judge else 1
        if kind == "cold":
            answered = self._cold(prompt.ids, new_tokens)
        elif kind == "cachegen":
            answered = self._with_cachegen(tokens, new_tokens)
        else:
            answered = self._fetching(self._models[policy], prompt.ids, new_tokens)
        self._last[policy] = TracedRun(policy, answered.timeline, answered.ttft_s)
        timeline, until_s = answered.timeline, answered.ttft_s
        measured: dict[str, Any] = {
            "ttft_s": answered.ttft_s,
            "bytes": answered.received_bytes,
            "reused_tokens": answered.reused_tokens,
            "computed_tokens": prompt.ids.shape[1] - answered.reused_tokens,
            "stage_s": {stage: timeline.busy_s(stage, until_s) for stage in STAGES},
            "replans": answered.replans,
            "encodings": sorted(answered.encodings),
        }
        return measured | (self._judged(tokens, answered) if judge else {})

    def draw(self, policy: str, title: str, trace: str | None, timeline: str | None) -> None:
        """Writes the policy's last run as a Chrome trace and as a plot."""
        run = self._last[policy]
        if trace is not None:
            Path(trace).write_text(json.dumps(run.timeline.chrome_trace()))
        if timeline is not None:
            plot_timelines([run], title, Path(timeline))

    def _cold(self, ids: torch.Tensor, new_tokens: int) -> _Answered:
        timeline, first = Timeline(), FirstTokenTimer()
        with timeline.span("compute"):
            output = self._model.generate(ids, streamer=first, **_decoding(new_tokens))
        return _Answered(output, timeline, first.ttft_s, 0, 0)

    def _fetching(self, cached: CachedModel, ids: torch.Tensor, new_tokens: int) -> _Answered:
        first = FirstTokenTimer()
        output = cached.generate(ids, streamer=first, **_decoding(new_tokens))
        report = cached.last_report
        fetch = report.fetch
        return _Answered(
            output,
            report.timeline,
            first.ttft_s,
            report.reused_tokens,
            fetch.received_bytes if fetch else 0,
            tuple(encoding.name for encoding in fetch.encodings) if fetch else (),
            fetch.replans if fetch else 0,
        )

    def _with_cachegen(self, tokens: int, new_tokens: int) -> _Answered:
        """Receives as many bytes over the link as CacheGen would, then uses KV that was decoded before. So decoding
        takes no time here."""
        cache = DynamicCache()
        decoded = self._decoded[tokens]
        for layer, (keys, values) in enumerate(zip(decoded["keys"], decoded["values"], strict=True)):
            cache.update(keys[None], values[None], layer)
        timeline, first = Timeline(), FirstTokenTimer()
        with timeline.span("receive"):
            self._stream.receive(self._sizes[tokens])
        with timeline.span("compute"):
            output = self._model.generate(
                self._prompts[tokens].ids, past_key_values=cache, streamer=first, **_decoding(new_tokens)
            )
        return _Answered(output, timeline, first.ttft_s, tokens, self._sizes[tokens])

    def _judged(self, tokens: int, answered: _Answered) -> dict[str, Any]:
        predicted = self._log_probabilities(tokens, answered.output.past_key_values)
        answer = tuple(answered.output.sequences[0, self._prompts[tokens].ids.shape[1] :].tolist())
        # The first judged policy, `cold`, is the reference of all others.
        exact = self._references.setdefault(tokens, _Reference(answer, predicted))
        divergence = (exact.log_probabilities.exp() * (exact.log_probabilities - predicted)).sum(-1)
        return {"kl": float(divergence.mean()), "same_tokens": answer == exact.tokens}

    @torch.no_grad()
    def _log_probabilities(self, tokens: int, cache: DynamicCache) -> torch.Tensor:
        """Log-probabilities of the continuation after the KV in `cache`, f32 `[continuation, vocabulary]`."""
        prompt = self._prompts[tokens]
        answered = cache.get_seq_length() - prompt.ids.shape[1]
        if answered:
            cache.crop(-answered)
        logits = self._model(prompt.continuation.unsqueeze(0), past_key_values=cache, use_cache=True).logits
        predicted: torch.Tensor = logits[0].float().log_softmax(-1)
        return predicted

    def close(self) -> None:
        for cached in self._models.values():
            cached.close()
            cached.client.close()


def _decoding(new_tokens: int) -> dict[str, Any]:
    return {
        "max_new_tokens": new_tokens,
        "min_new_tokens": new_tokens,
        "do_sample": False,
        "return_dict_in_generate": True,
    }


if __name__ == "__main__":
    logging.disable_progress_bar()
    engine = _Engine()
    serve({"load": engine.load, "measure": engine.measure, "draw": engine.draw}, Answers())
    engine.close()
