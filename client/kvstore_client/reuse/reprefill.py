"""Reuse of a part of a prompt's prefix: that which the rest of the prompt attends to."""

from __future__ import annotations

import torch

from kvstore_client.contiguous.plan import ReprefillPlan, reprefill_plan
from kvstore_client.contiguous.request import PartialPrefix
from kvstore_client.match import Match
from kvstore_client.miss_reason import MissReason
from kvstore_client.reuse.call import EngineCall
from kvstore_client.reuse.engine import DecoderLayers
from kvstore_client.reuse.features import PromptFeatures
from kvstore_client.reuse.identity import ModelSnapshot
from kvstore_client.reuse.parts import SessionParts
from kvstore_client.reuse.pending import CompletedCall, ReusingGeneration
from kvstore_client.reuse.prefix import PrefixGeneration
from kvstore_client.reuse.prompt_run import PromptRun
from kvstore_client.reuse.report import GenerationReport
from kvstore_client.settings import Budget
from kvstore_client.timeline import Timeline
from kvstore_codec.errors import FetchError
from kvstore_codec.identity import CHUNK_TOKENS


class ReprefillGeneration(ReusingGeneration):
    """A call whose prompt attends to a part of its stored prefix. Its KV is not stored: that of a plain prefill
    differs."""

    def __init__(
        self,
        parts: SessionParts,
        decoder: DecoderLayers,
        call: EngineCall,
        snapshot: ModelSnapshot,
        timeline: Timeline,
        match: Match,
        plan: ReprefillPlan,
    ) -> None:
        super().__init__(call, snapshot, timeline, None, None)
        self._parts, self._decoder, self._plan = parts, decoder, plan
        self._match: Match | None = match
        """Its leases; None once they are released or passed on."""

    @classmethod
    def begin(
        cls,
        parts: SessionParts,
        decoder: DecoderLayers,
        call: EngineCall,
        snapshot: ModelSnapshot,
        timeline: Timeline,
        budget: Budget,
    ) -> ReusingGeneration:
        """Look up the prompt's stored prefix, and what a part of it is chosen by. Without that, the prefix is reused in
        full (PrefixGeneration)."""
        client = parts.client
        tokens: list[int] = call.tokens.tolist()
        match = client.match(snapshot.spec, client.chunk_ids(snapshot.spec, tokens), timeline)
        plan = None
        if match.chunks:
            try:
                with timeline.span("lookup", "key summaries"):
                    plan = reprefill_plan(
                        match, len(tokens), budget, snapshot.spec, decoder, client, parts.costs
                    )
            except (RuntimeError, MemoryError):
                plan = None
        if plan is None:
            return PrefixGeneration.of_match(parts, call, snapshot, timeline, match)
        return cls(parts, decoder, call, snapshot, timeline, match, plan)

    def complete(self) -> CompletedCall:
        try:
            completed = self._over_part()
            return self._in_full() if completed is None else completed
        finally:
            self.cancel()

    def question_states(self) -> tuple[torch.Tensor, GenerationReport]:
        """Hidden states that leave the last layer for the tokens behind the prefix, `[1, tokens, hidden]`. Raises
        FetchError when too few of the chosen frames arrive. Releases all resources."""
        partial = None
        try:
            partial = self._start()
            if partial is None:
                raise FetchError(
                    "there is no memory or thread left to compute a question over a part of its prefix"
                )
            return partial.question_states(), self._report(partial)
        finally:
            if partial is not None:
                partial.close()
            self.cancel()

    def cancel(self) -> None:
        match, self._match = self._match, None
        if match is not None:
            self._parts.client.release(match)
        super().cancel()

    def _over_part(self) -> CompletedCall | None:
        """Answer over a part of the prefix. None when that part did not arrive, or there is no memory or thread for
        it."""
        parts, plan = self._parts, self._plan
        partial = self._start()
        if partial is None:
            return None
        try:
            with parts.client.links.computing(request=self.timeline):
                computed = partial.compute()
            if computed is None:
                return None
            held, state = computed
            run = PromptRun(parts, self.call, self.snapshot.spec.layers, self.timeline)
            generated = run.over_part(partial.kv, plan.grid.tokens - held, state)
        finally:
            partial.close()
            parts.client.metrics.reprefilled(partial.report)
        parts.client.report(partial.attention)
        if generated.tokens // CHUNK_TOKENS > plan.grid.tokens // CHUNK_TOKENS:
            parts.client.metrics.missed(MissReason.STORE_BEHIND_PART)
        return CompletedCall(generated.output, self._report(partial))

    def _report(self, partial: PartialPrefix) -> GenerationReport:
        tokens, prefix = len(self.call.tokens), self._plan.grid.tokens
        return GenerationReport(tokens, prefix, self.timeline, reprefill=partial.report)

    def _in_full(self) -> CompletedCall:
        """Answer as without a budget."""
        match, self._match = self._match or Match(), None
        full = PrefixGeneration.of_match(self._parts, self.call, self.snapshot, self.timeline, match)
        return full.complete()

    def _start(self) -> PartialPrefix | None:
        parts, tokens = self._parts, self.call.tokens
        rotary, features = parts.engine.rotary(len(tokens)), PromptFeatures(parts.engine.embed, tokens)
        try:
            return PartialPrefix(
                self._plan, tokens, self.snapshot.spec, parts.client, self._decoder, rotary, features, self.timeline,
            )  # fmt: skip
        except (RuntimeError, MemoryError) as error:
            detail = f"a question cannot be computed over a part of its prefix: {error}"
            parts.client.metrics.missed(MissReason.NO_RESOURCES, detail=detail)
            return None
