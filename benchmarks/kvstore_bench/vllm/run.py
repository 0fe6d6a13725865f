"""The benchmark: in each round every policy answers every prompt behind every link, in turn."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

from kvstore_bench.shaping.netns import NetworkNamespace
from kvstore_bench.vllm.completions import Answer
from kvstore_bench.vllm.http_call import RequestError
from kvstore_bench.vllm.links import link_name
from kvstore_bench.vllm.options import Options
from kvstore_bench.vllm.policies import COLD, LEARNING_POLICIES, Deployment
from kvstore_bench.vllm.prompts import Prompt
from kvstore_bench.vllm.rows import Sample
from kvstore_bench.vllm.storing import store_prompts
from kvstore_codec.errors import ServiceError
from kvstore_service.calibration import Report

_QUIET_S, _QUIET_LIMIT_S = 0.3, 120.0
"""A request is sent when the link has been silent for so long, so that no bytes of the last one are counted as its own;
the second limit is for a link that is never silent."""
_SLOWER, _SLOWER_S, _ROUNDS_OF_SLOWER = 3.0, 10.0, 2
"""A policy that took 3 times as long as a cold run, and more than 10 s, is asked in the first two rounds only."""
_SETTLING = 2
"""Requests of each of LEARNING_POLICIES that are not counted after a change of the link."""
_FAILURES = 3
"""A policy that has failed so many times in a row is left out."""


@dataclass(slots=True)
class Measured:
    """Results so far."""

    samples: list[Sample] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    """Policies that are not measured (any more), with the reason."""
    notes: list[str] = field(default_factory=list)
    complete_rounds: int = 0


Keep = Callable[[Measured], None]
"""Writes the results so far to files. Called after every link."""


class Bench:
    def __init__(
        self,
        options: Options,
        link: NetworkNamespace,
        deployments: Mapping[str, Deployment],
        prompts: Mapping[int, Sequence[Prompt]],
        report: Report,
        keep: Keep,
        measured: Measured,
    ) -> None:
        self._options, self._link, self._prompts = options, link, prompts
        self._deployments = dict(deployments)
        self._report, self._keep, self.measured = report, keep, measured
        self._references: dict[tuple[int, int, int], tuple[int, ...] | None] = {}
        self._in_a_row: dict[str, int] = {}
        self._cell_s: dict[tuple[int, float | None], float] = {}
        self._began_s = time.monotonic()

    def prepare(self) -> None:
        """Every policy stores every prompt, over the unshaped link."""
        self._link.set_bandwidth(None)
        for number, (name, deployment) in enumerate(list(self._deployments.items())):
            self._report.advance("store", number, len(self._deployments))
            try:
                self._store(deployment)
            except (RequestError, ServiceError) as error:
                self._leave_out(name, f"nothing could be stored: {error}")
        self._report.advance("store", 1, 1)

    def measure(self) -> None:
        """All rounds, or as many as fit into the budget."""
        options = self._options
        cells = [(tokens, link) for tokens in options.tokens for link in options.links]
        steps = options.rounds * len(cells)
        for number in range(options.rounds):
            for place, (tokens, bandwidth_bps) in enumerate(cells):
                self._report.advance("ask", number * len(cells) + place, steps)
                if not self._fits(tokens, bandwidth_bps):
                    self._note(f"the time was over in round {number + 1} of {options.rounds}")
                    return
                began_s = time.monotonic()
                self._cell(number, tokens, bandwidth_bps)
                self._cell_s[tokens, bandwidth_bps] = time.monotonic() - began_s
                self._say(number, tokens, bandwidth_bps)
                self._keep(self.measured)
            self.measured.complete_rounds = number + 1
        self._report.advance("ask", steps, steps)
        self._keep(self.measured)

    def _say(self, number: int, tokens: int, bandwidth_bps: float | None) -> None:
        about = (number, tokens, bandwidth_bps)
        said = [
            f"{sample.policy} {sample.ttft_s:.2f} s"
            if sample.ttft_s is not None
            else f"{sample.policy} failed"
            for sample in self.measured.samples
            if (sample.round, sample.prompt_tokens, sample.bandwidth_bps) == about and sample.counted
        ]
        where = f"round {number + 1}, {tokens} tokens, {link_name(bandwidth_bps)}"
        self._report.note(f"{where}: {', '.join(said)}")

    def _note(self, text: str) -> None:
        self.measured.notes.append(text)
        self._report.note(text)

    def _store(self, deployment: Deployment) -> None:
        prompts = [prompt for prompts in self._prompts.values() for prompt in prompts]
        ask = partial(self._ask_anew, deployment)
        if deployment.store is None:
            for prompt in prompts:
                ask(prompt)
            return
        stored = store_prompts(ask, deployment.store, prompts)
        self._note(f"{deployment.name} has stored {stored} objects")

    def _ask_anew(self, deployment: Deployment, prompt: Prompt) -> Answer:
        deployment.forget()
        return self._ask(deployment, prompt)

    def _cell(self, number: int, tokens: int, bandwidth_bps: float | None) -> None:
        """Each policy once, beginning with another one in each round."""
        self._link.set_bandwidth(bandwidth_bps)
        prompts = self._prompts[tokens]
        prompt = prompts[number % len(prompts)]
        names = list(self._deployments)
        turn = number % len(names)
        for name in (*names[turn:], *names[:turn]):
            if name not in self._deployments or self._is_too_slow(name, tokens, bandwidth_bps):
                continue
            for counted in (False,) * (_SETTLING if name in LEARNING_POLICIES else 0) + (True,):
                sample = self._sample(self._deployments[name], prompt, number, bandwidth_bps, counted=counted)
                self.measured.samples.append(sample)
                self._count_failure(name, sample)

    def _sample(
        self,
        deployment: Deployment,
        prompt: Prompt,
        number: int,
        bandwidth_bps: float | None,
        *,
        counted: bool,
    ) -> Sample:
        about = (deployment.name, len(prompt.ids), bandwidth_bps, number, prompt.text)
        try:
            deployment.forget()
            self._wait_for_a_silent_link()
            before = self._link.bytes_from_inside
            answer = self._ask(deployment, prompt)
            link_bytes = self._link.bytes_from_inside - before
        except RequestError as error:
            return Sample(*about, None, failure=str(error), counted=counted)
        cold, memory = self._reference(prompt, 0), self._reference(prompt, answer.reused_tokens)
        return Sample(
            *about,
            answer.ttft_s,
            answer.reused_tokens,
            link_bytes,
            answer.decode_tokens_per_s,
            None if cold is None else answer.tokens == cold,
            None if memory is None else answer.tokens == memory,
            counted=counted,
        )

    def _ask(self, deployment: Deployment, prompt: Prompt) -> Answer:
        options = self._options
        return deployment.completions.complete(prompt.ids, options.answer_tokens, options.silence_s)

    def _reference(self, prompt: Prompt, reused_tokens: int) -> tuple[int, ...] | None:
        """What vLLM answers when its own prefix cache has so many tokens of the prompt; None where it cannot have just
        as many."""
        key = len(prompt.ids), prompt.text, reused_tokens
        if key not in self._references:
            engine, silence_s = self._deployments[COLD].completions, self._options.silence_s
            try:
                engine.forget()
                if reused_tokens:
                    engine.complete(prompt.ids[:reused_tokens], 1, silence_s)
                answer = engine.complete(prompt.ids, self._options.answer_tokens, silence_s)
            except RequestError:
                return None
            self._references[key] = answer.tokens if answer.reused_tokens == reused_tokens else None
        return self._references[key]

    def _wait_for_a_silent_link(self) -> None:
        deadline, last, since_s = time.monotonic() + _QUIET_LIMIT_S, -1, time.monotonic()
        while time.monotonic() < min(deadline, since_s + _QUIET_S):
            if (seen := self._link.bytes_from_inside) - last > 10_000:  # beyond keep-alives and statistics
                last, since_s = seen, time.monotonic()
            time.sleep(0.05)

    def _is_too_slow(self, name: str, tokens: int, bandwidth_bps: float | None) -> bool:
        cell = [
            s for s in self.measured.samples if (s.prompt_tokens, s.bandwidth_bps) == (tokens, bandwidth_bps)
        ]
        times = {
            policy: [s.ttft_s for s in cell if s.policy == policy and s.ttft_s is not None and s.counted]
            for policy in (COLD, name)
        }
        if len(times[name]) < _ROUNDS_OF_SLOWER or not times[COLD]:
            return False
        return min(times[name]) > max(_SLOWER * max(times[COLD]), _SLOWER_S)

    def _count_failure(self, name: str, sample: Sample) -> None:
        failed = self._in_a_row[name] = self._in_a_row.get(name, 0) + 1 if sample.failure else 0
        engine = self._deployments[name].engine
        if engine.has_ended():
            self._leave_out(name, f"vLLM ended: {engine.log_end()}")
        elif failed >= _FAILURES:
            self._leave_out(name, f"failed {failed} times in a row: {sample.failure}")

    def _leave_out(self, name: str, why: str) -> None:
        if name == COLD:  # nothing can be compared without it
            raise ServiceError(f"{name}: {why}")
        self.measured.left_out[name] = why
        del self._deployments[name]
        self._report.note(f"without {name} from here on: {why}")

    def _fits(self, tokens: int, bandwidth_bps: float | None) -> bool:
        budget_s = self._options.budget_s
        if budget_s is None:
            return True
        needed_s = self._cell_s.get((tokens, bandwidth_bps), 0.0)
        return time.monotonic() - self._began_s + needed_s < budget_s
