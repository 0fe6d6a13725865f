"""`ReuseSession`: lets an engine that knows a prompt's tokens reuse KV computed earlier by any worker.

A *canary* is the KV of a fixed probe text, which the cluster keeps for each model. Each worker compares its own KV of
the text with the canary before it reuses or stores any KV. A *refusal* is one word that says why KV must not be reused
or stored. A *bypassed* call runs as if there were no service.
"""

from dataclasses import replace
from typing import Any

import torch

from kvstore_client.canaries import FINAL
from kvstore_client.client import KVStoreClient
from kvstore_client.match import Match
from kvstore_client.miss_reason import MissReason
from kvstore_client.planning import Costs
from kvstore_client.request_id import request_scope
from kvstore_client.reuse.blend import SegmentReuse
from kvstore_client.reuse.call import EngineCall
from kvstore_client.reuse.engine import Engine
from kvstore_client.reuse.identity import CanaryCheck, DescribedModel, ModelSnapshot
from kvstore_client.reuse.parts import SessionParts
from kvstore_client.reuse.pending import BypassedGeneration, PendingGeneration, ReusingGeneration
from kvstore_client.reuse.prefix import PrefixGeneration
from kvstore_client.reuse.report import GenerationReport
from kvstore_client.reuse.reprefill import ReprefillGeneration
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
        """Look up the prompt's stored KV and start to fetch it. Computes no KV of the prompt. Waits for the lookup, up
        to `timeouts.lookup_s`, and for a comparison of the model with its canary; these waits of all calls together
        take up to `timeouts.canary_s`. Raises InvalidTokensError for segments that do not sum to the prompt."""
        with request_scope():
            return self._begin(call, self._client.tracing.timeline())

    def _begin(self, call: EngineCall, timeline: Timeline) -> PendingGeneration:
        reason = call.bypass_reason()
        if reason is not None:
            return BypassedGeneration(call, reason, timeline)
        model = self._current(call.tokens)
        if model.refusal is not None:
            return BypassedGeneration(call, model.refusal.reason, timeline)
        spec, client = model.spec, self._client
        refusal = self._canary.refusal(spec, wait_s=client.settings.timeouts.canary_s)
        if refusal in FINAL:  # other KV than the canary's, or the comparison failed: neither fetch nor store
            return BypassedGeneration(call, refusal, timeline, self._canary.why(refusal))
        generation = client.canaries.generation(spec.digest)
        snapshot = ModelSnapshot(model, generation, compared=refusal is None)
        if refusal is not None:
            # The comparison is pending, or the coordinator is unreachable: do not fetch. The computed KV is stored if
            # the comparison has succeeded by the end of the call.
            self._require_segments(call, model)
            why_not = self._canary.count_refusal(refusal)
            return PrefixGeneration(self._parts, call, snapshot, timeline, why_not=why_not)
        if self._segments is not None and _has_several_segments(call):
            return SegmentGeneration.begin(self._parts, self._segments, call, snapshot, timeline)
        self._require_segments(call, model)
        if call.budget is not None and self._engine.decoder is not None:
            decoder = self._engine.decoder
            return ReprefillGeneration.begin(self._parts, decoder, call, snapshot, timeline, call.budget)
        return PrefixGeneration.begin(self._parts, call, snapshot, timeline)

    def is_stored(self, call: EngineCall) -> bool:
        """Whether `begin` would find KV to fetch. Takes no lease, and the lookup is not recorded as a use of the KV.
        Raises InvalidTokensError as `begin` does."""
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
        """Return the engine's answer. A call that reuses KV is begun again if, since `begin`, the model, its canary or
        the engine's mode changed, or the process was forked. A bypassed call is not checked again."""
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
        """Begin the call and complete it at once, without the checks of `finish`."""
        return self._complete(self.begin(call))

    @torch.inference_mode()
    def question_states(self, call: EngineCall) -> torch.Tensor:
        """Return the last layer's output for the tokens of the last segment, `[1, tokens, hidden]`. The other segments
        are reused as in `begin`, however many of their tokens must be recomputed and however long that takes. Without
        segments, return it for the tokens behind the stored prefix, over a part of it as the call's budget says. For
        measuring how reuse changes the answer. Raises UnsupportedModelError if the model or its state does not allow
        reuse, and FetchError if the canary refuses reuse, if stored KV does not arrive, or if a part of the prefix
        cannot be chosen."""
        if self._segments is None:
            raise UnsupportedModelError(f"segments of {self._model.spec.model_id} cannot be reused")
        model = self._current()
        if model.refusal is not None:
            raise UnsupportedModelError(f"{model.spec.model_id}: {model.refusal.detail}")
        refusal = self._canary.refusal(model.spec, wait_s=self._client.settings.timeouts.canary_s)
        if refusal is not None:
            raise FetchError(f"no KV of {model.spec.model_id} may be reused: {self._canary.why(refusal)}")
        snapshot = ModelSnapshot(model, self._client.canaries.generation(model.spec.digest))
        if call.budget is not None and self._engine.decoder is not None and not _has_several_segments(call):
            part = ReprefillGeneration.begin(
                self._parts, self._engine.decoder, call, snapshot, Timeline(), call.budget
            )
            if not isinstance(part, ReprefillGeneration):
                part.cancel()
                raise FetchError(
                    "no part of the prompt's prefix can be chosen: it is not stored with summaries"
                )
            states, self.last_report = part.question_states()
            return states
        pending = SegmentGeneration.begin_whole(self._parts, self._segments, call, snapshot, Timeline())
        states, self.last_report = pending.question_states()
        return states

    def _complete(self, pending: PendingGeneration) -> Any:
        with request_scope(pending.timeline.request_id):
            return self._completed(pending)

    def _completed(self, pending: PendingGeneration) -> Any:
        metrics = self._client.metrics
        if isinstance(pending, BypassedGeneration):
            metrics.missed(MissReason.of_bypass(pending.reason))
            self.last_report = pending.report
            return pending.call.pass_through()
        completed = pending.complete()
        report = self.last_report = completed.report
        computed = report.prompt_tokens - report.reused_tokens
        metrics.prompt(reused_tokens=report.reused_tokens, computed_tokens=computed)
        facts = {"kvstore.prompt_tokens": report.prompt_tokens, "kvstore.reused_tokens": report.reused_tokens}
        self._client.tracing.export(report.timeline, "kvstore.generate", facts)
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
        if self._segments is not None and _has_several_segments(call):
            segments = () if call.segments is None else call.segments  # a tensor has no truth value
            return self._segments.peek(model.spec, tokens, segments)
        self._require_segments(call, model)
        ids = self._client.chunk_ids(model.spec, tokens)
        return self._client.match(model.spec, ids, peek=True)

    def _require_segments(self, call: EngineCall, model: DescribedModel) -> None:
        """Raises InvalidTokensError for segments that do not sum to the prompt."""
        if call.segments is not None:
            self._client.segment_chunks(model.spec, call.tokens.tolist(), call.segments)


def _has_several_segments(call: EngineCall) -> bool:
    """Whether the prompt has segments before its last one. Those are documents, which can be reused at any position; a
    single segment is reused as a prefix."""
    return call.segments is not None and len(call.segments) > 1
