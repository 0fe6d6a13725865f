"""Passes of one call through the model: over reused KV, and over chunks computed in place of missing ones."""

import torch

from kvstore_client.buffers import KVBuffers
from kvstore_client.reuse.call import EngineCall, LayerArrives, PromptPass
from kvstore_client.reuse.capture import KeyCapture
from kvstore_client.reuse.generated import ComputedRun, GenerationResult
from kvstore_client.reuse.incoming import IncomingKV, layers_of
from kvstore_client.reuse.parts import SessionParts
from kvstore_client.timeline import Timeline
from kvstore_codec.errors import FetchIncompleteError
from kvstore_codec.identity import CHUNK_TOKENS


class PromptRun:
    """Runs one call, by one of `prefill`, `behind` and `over`. All raise the engine's errors."""

    def __init__(self, parts: SessionParts, call: EngineCall, layers: int, timeline: Timeline) -> None:
        self._parts, self._call, self._layers, self._timeline = parts, call, layers, timeline
        self.aborted: GenerationResult | None = None
        """KV computed before an engine error ended the call, if any."""

    def prefill(self) -> GenerationResult:
        """Compute the whole prompt."""
        capture = self._capture(0)
        generated = self._pass(capture)
        costs = self._parts.costs
        # Duration of a prefill without reuse. On other devices the call returns before the work is done.
        if costs is not None and self._parts.engine.device.type == "cpu" and capture.first_pass_s:
            costs.observe_prefill(0, len(self._call.tokens), capture.first_pass_s)
        return generated

    def behind(self, incoming: IncomingKV) -> GenerationResult:
        """Compute the chunks that are missing or faster to compute, then all tokens behind the fetched ones while those
        arrive."""
        fetch, buffers = incoming.fetch, incoming.buffers
        runs: list[ComputedRun] = []
        try:
            while True:
                while (run := fetch.next_to_compute()) is not None:
                    runs.append(self._compute(buffers, range(*run)))
                    fetch.computed(*run)
                # At least one token must pass through the model: its logits give the next token.
                capture = self._capture(min(fetch.reusable_tokens, len(self._call.tokens) - 1))
                began_s = self._timeline.now_s()
                try:
                    if capture.first_token:
                        generated = self._pass(capture, buffers, layers_of(fetch, self._timeline))
                    else:
                        fetch.finish()
                        generated = self._pass(capture)
                except FetchIncompleteError:
                    continue
                report = fetch.finish()
                if self._parts.engine.device.type == "cpu" and capture.first_token:
                    fetch.learn(began_s, began_s + capture.first_pass_s)
                return generated.behind(report, runs, buffers)
        except BaseException:
            if self.aborted is not None:
                self.aborted = self.aborted.behind(fetch.finish(), runs, buffers)
            raise

    def over(self, kv: KVBuffers) -> GenerationResult:
        """Compute the prompt's last token behind the KV of all others."""
        return self._pass(self._capture(len(self._call.tokens) - 1), kv)

    def over_part(self, kv: KVBuffers, left_out: int, state: torch.Tensor) -> GenerationResult:
        """Answer behind the KV of all tokens of the prompt but `left_out` earlier ones. `state` is the hidden state of
        the last token that leaves the last layer, `[1, 1, hidden]`."""
        return self._pass(self._capture(len(self._call.tokens) - 1), kv, left_out=left_out, state=state)

    def _capture(self, first_token: int) -> KeyCapture:
        return KeyCapture(self._layers, first_token)

    def _compute(self, buffers: KVBuffers, chunks: range) -> ComputedRun:
        """Compute the KV of a run of chunks into the buffers; the KV of all preceding chunks is there."""
        capture = self._capture(chunks.start * CHUNK_TOKENS)
        tokens = self._call.tokens[chunks.start * CHUNK_TOKENS : chunks.stop * CHUNK_TOKENS]
        with (
            self._timeline.span("compute", f"chunks {chunks.start}-{chunks.stop - 1}"),
            capture.active(),
            self._parts.client.links.computing(),
            torch.inference_mode(),
        ):
            self._parts.engine.compute(tokens, buffers, capture)
        return ComputedRun(chunks, capture)

    def _pass(
        self,
        capture: KeyCapture,
        reused: KVBuffers | None = None,
        arrives: LayerArrives | None = None,
        left_out: int = 0,
        state: torch.Tensor | None = None,
    ) -> GenerationResult:
        """Run the call over reused KV."""
        attempt = self._call.prompt_pass(capture, reused, arrives, left_out, state)
        storing = self._parts.storing.active and state is None
        # A few tokens mostly wait for fetched KV; more of them take the processor from the fetch.
        waits = len(self._call.tokens) - capture.first_token < CHUNK_TOKENS
        computing = self._parts.client.links.computing(request=self._timeline, waits=waits)
        with self._timeline.span("compute"), capture.active(), computing:
            try:
                ended = attempt.run()
            except FetchIncompleteError:
                raise
            except BaseException:  # for example a streamer whose client has left: the computed KV is kept
                self.aborted = self._salvaged(attempt, capture) if storing else None
                raise
        left = attempt.take(values=storing)
        return GenerationResult(ended.output, ended.sequence, left.tokens, left.values, capture)

    def _salvaged(self, attempt: PromptPass, capture: KeyCapture) -> GenerationResult | None:
        left, tokens = attempt.salvage(), self._call.tokens
        if left is None:
            return None
        return GenerationResult(None, tokens, min(left.tokens, len(tokens)), left.values, capture)
