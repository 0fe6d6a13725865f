"""`ReuseSession`: lets an engine that knows a prompt's tokens reuse KV computed earlier by any worker."""

from dataclasses import replace
from typing import Any

import torch

from kvstore_client.canaries import FINAL
from kvstore_client.client import KVStoreClient
from kvstore_client.match import Match
from kvstore_client.miss_reason import MissReason
from kvstore_client.planning import Costs
from kvstore_client.reuse.blend import SegmentReuse
from kvstore_client.reuse.call import EngineCall
from kvstore_client.reuse.engine import Engine
from kvstore_client.reuse.identity import CanaryCheck, DescribedModel, ModelSnapshot
from kvstore_client.reuse.parts import SessionParts
from kvstore_client.reuse.pending import BypassedGeneration, PendingGeneration, ReusingGeneration
from kvstore_client.reuse.prefix import PrefixGeneration
from kvstore_client.reuse.report import GenerationReport
from kvstore_client.reuse.segments import SegmentGeneration
from kvstore_client.reuse.store_policy import StorePolicy
from kvstore_client.timeline import Timeline
from kvstore_codec.errors import FetchError, UnsupportedModelError


class ReuseSession:
    """Answers the calls of one model. Stored KV of a prompt is fetched while the rest is computed, and newly computed
    KV is stored in the background. When the service fails, missing KV is computed and the call still returns its
    answer.

    One thread at a time uses a session, except for `begin` and `is_stored`.
    """

    def __init__(
        self,
        engine: Engine,
        client: KVStoreClient,
        canary: CanaryCheck,
        costs: Costs | None,
        *,
        store: bool = True,
    ) -> None:
        self.storing = StorePolicy(client, canary, active=store)
        self.last_report = GenerationReport(0, 0, Timeline())
        """What the latest call reused; empty before the first."""
        self._parts = SessionParts(client, engine, costs, self.storing)
        self._client, self._engine, self._canary = client, engine, canary
        self._segments = None
        """None for a model that can reuse only a prompt's prefix."""
        if engine.decoder is not None:
            self._segments = SegmentReuse(engine.decoder, engine.embed, client, costs)
        self._model = engine.look()
        """The model at its latest inspection."""
        self._watch(self._model)

    def begin(self, call: EngineCall) -> PendingGeneration:
        """Look up the prompt's stored KV and start to fetch it. Computes nothing, and waits only for the lookup and for
        the first comparison of the model with its canary. Raises InvalidTokensError for segments that do not sum to the
        prompt."""
        timeline = Timeline()
        reason = call.bypass_reason()
        if reason is not None:
            return BypassedGeneration(call, reason, timeline)
        model = self._current(call.tokens)
        if model.refusal is not None:
            return BypassedGeneration(call, model.refusal.reason, timeline)
        spec, client = model.spec, self._client
        refusal = self._canary.refusal(spec, wait_s=client.settings.timeouts.canary_s)
        if refusal in FINAL:
            return BypassedGeneration(call, refusal, timeline, self._canary.why(refusal))
        generation = client.canaries.generation(spec.digest)
        snapshot = ModelSnapshot(model, generation, compared=refusal is None)
        if refusal is not None:
            self._require_segments(call, model)
            why_not = self._canary.count(refusal)
            return PrefixGeneration(self._parts, call, snapshot, timeline, why_not=why_not)
        if self._segments is not None and _has_documents(call):
            return SegmentGeneration.begin(self._parts, self._segments, call, snapshot, timeline)
        self._require_segments(call, model)
        return PrefixGeneration.begin(self._parts, call, snapshot, timeline)

    def is_stored(self, call: EngineCall) -> bool:
        """Whether `begin` would find KV to fetch. Takes no lease and does not count as a use. Raises the same
        errors."""
        if call.bypass_reason() is not None:
            return False
        model = self._engine.look(call.tokens)
        if model.refusal is not None:
            return False
        if self._canary.refusal(model.spec, wait_s=self._client.settings.timeouts.lookup_s) is not None:
            self._require_segments(call, model)
            return False
        return bool(self._peek(call, model).chunks)

    def finish(self, pending: PendingGeneration) -> Any:
        """The engine's answer. A call is begun again when its model has changed or its canary was replaced since
        `begin`, or when it was begun in the parent process."""
        if isinstance(pending, ReusingGeneration):
            model = self._current()
            generation = self._client.canaries.generation(model.spec.digest)
            if pending.snapshot.is_still(model, generation) and pending.call.bypass_reason() is None:
                pending.snapshot = replace(pending.snapshot, model=model)
            else:  # the fetched KV is for another model, process or engine mode
                pending.cancel()
                pending = self.begin(pending.call)
        return self._complete(pending)

    def answer(self, call: EngineCall) -> Any:
        """Run `begin` and `finish`."""
        return self._complete(self.begin(call))

    @torch.inference_mode()
    def question_states(self, call: EngineCall) -> torch.Tensor:
        """Hidden states that leave the last layer for the tokens of the last segment, `[1, tokens, hidden]`, with the
        other segments reused as in `begin`, but whatever share of them must be computed. For measuring how reuse
        changes the answer. Raises UnsupportedModelError where segments cannot be reused, and FetchError when stored KV
        does not arrive."""
        if self._segments is None:
            raise UnsupportedModelError(f"segments of {self._model.spec.model_id} cannot be reused")
        model = self._current()
        if model.refusal is not None:
            raise UnsupportedModelError(f"{model.spec.model_id}: {model.refusal.detail}")
        refusal = self._canary.refusal(model.spec, wait_s=self._client.settings.timeouts.canary_s)
        if refusal is not None:
            raise FetchError(f"nothing may be reused: {self._canary.why(refusal)}")
        snapshot = ModelSnapshot(model, self._client.canaries.generation(model.spec.digest))
        pending = SegmentGeneration.begin_whole(self._parts, self._segments, call, snapshot, Timeline())
        states, self.last_report = pending.question_states()
        return states

    def _complete(self, pending: PendingGeneration) -> Any:
        metrics = self._client.metrics
        if isinstance(pending, BypassedGeneration):
            metrics.missed(MissReason.of_bypass(pending.reason))
            self.last_report = pending.report
            return pending.call.pass_through()
        completed = pending.complete()
        report = self.last_report = completed.report
        computed = report.prompt_tokens - report.reused_tokens
        metrics.prompt(reused_tokens=report.reused_tokens, computed_tokens=computed)
        return completed.output

    def _current(self, tokens: torch.Tensor | None = None) -> DescribedModel:
        """Inspect the model, and in particular the embeddings of these tokens. Renews hooks and preparation when the
        model has changed."""
        model = self._engine.look(tokens)
        if model != self._model:
            self._engine.renew_hooks()  # its modules may not be the hooked ones
            self._watch(model)
            model = self._model = self._engine.look()
        return model

    def _watch(self, model: DescribedModel) -> None:
        self._canary.watch(model.spec)
        self._client.prepare(model.spec)

    def _peek(self, call: EngineCall, model: DescribedModel) -> Match:
        tokens: list[int] = call.tokens.tolist()
        if self._segments is not None and _has_documents(call):
            segments = () if call.segments is None else call.segments  # a tensor has no truth value
            return self._segments.peek(model.spec, tokens, segments)
        self._require_segments(call, model)
        ids = self._client.chunk_ids(model.spec, tokens)
        return self._client.match(model.spec, ids, peek=True)

    def _require_segments(self, call: EngineCall, model: DescribedModel) -> None:
        """Raises InvalidTokensError for segments that do not sum to the prompt."""
        if call.segments is not None:
            self._client.segment_chunks(model.spec, call.tokens.tolist(), call.segments)


def _has_documents(call: EngineCall) -> bool:
    return call.segments is not None and len(call.segments) > 1
