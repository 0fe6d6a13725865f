"""Reuse of documents in a segmented prompt, at any position."""

from dataclasses import replace

import torch

from kvstore_client.reuse.blend import (
    BlendedPrompt,
    SegmentFetch,
    SegmentPlan,
    SegmentReuse,
    blended_chunks,
    exact_beginning,
    prefilled_chunks,
)
from kvstore_client.reuse.call import EngineCall
from kvstore_client.reuse.generated import GenerationResult
from kvstore_client.reuse.identity import ModelSnapshot
from kvstore_client.reuse.incoming import IncomingKV
from kvstore_client.reuse.parts import SessionParts
from kvstore_client.reuse.pending import CompletedCall, ReusingGeneration
from kvstore_client.reuse.prefix import fetch_prefix
from kvstore_client.reuse.prompt_run import PromptRun
from kvstore_client.reuse.report import GenerationReport, why_nothing_reused
from kvstore_client.timeline import Timeline
from kvstore_codec.errors import FetchError

_NO_RESOURCES = "no_resources: there is no memory or thread left to fetch with"


class SegmentGeneration(ReusingGeneration):
    """A call that reuses documents stored in any context, or only its prompt's exact prefix where reusing the documents
    takes longer than a prefill."""

    def __init__(
        self,
        parts: SessionParts,
        segments: SegmentReuse,
        call: EngineCall,
        snapshot: ModelSnapshot,
        timeline: Timeline,
        plan: SegmentPlan,
    ) -> None:
        super().__init__(call, snapshot, timeline, None, plan.match.why_not)
        self._parts, self._segments = parts, segments
        self._plan = plan
        """Stored chunks of the prompt and how they are used."""
        self._documents: SegmentFetch | None = None
        """Fetch of the documents; None when the prefix is fetched, or nothing."""

    @classmethod
    def begin(
        cls,
        parts: SessionParts,
        segments: SegmentReuse,
        call: EngineCall,
        snapshot: ModelSnapshot,
        timeline: Timeline,
    ) -> "SegmentGeneration":
        """Look up the prompt's stored chunks and fetch what is faster to reuse than to compute. Raises
        InvalidTokensError for segments that do not sum to the prompt."""
        begun = cls._planned(parts, segments, call, snapshot, timeline)
        try:
            better = segments.worth(begun._plan, len(call.tokens))
            if better is not None:
                begun._fetch_documents(better)
            else:
                begun._fetch_beginning()
        finally:
            if begun.incoming is None:
                parts.client.release(begun._plan.match)
        return begun

    @classmethod
    def begin_whole(
        cls,
        parts: SessionParts,
        segments: SegmentReuse,
        call: EngineCall,
        snapshot: ModelSnapshot,
        timeline: Timeline,
    ) -> "SegmentGeneration":
        """Like `begin`, but fetch every stored chunk, however long that takes. Raises FetchError when this process has
        no memory or thread for it."""
        begun = cls._planned(parts, segments, call, snapshot, timeline)
        begun._fetch_documents(begun._plan)
        if begun.incoming is None:
            parts.client.release(begun._plan.match)
            raise FetchError(_NO_RESOURCES)
        return begun

    @classmethod
    def _planned(
        cls,
        parts: SessionParts,
        segments: SegmentReuse,
        call: EngineCall,
        snapshot: ModelSnapshot,
        timeline: Timeline,
    ) -> "SegmentGeneration":
        tokens: list[int] = call.tokens.tolist()
        lengths = () if call.segments is None else call.segments  # a tensor has no truth value
        plan = segments.plan(snapshot.spec, tokens, lengths, call.recompute, timeline)
        return cls(parts, segments, call, snapshot, timeline, plan)

    def complete(self) -> CompletedCall:
        run = PromptRun(self._parts, self.call, self.snapshot.spec.layers, self.timeline)
        blended: BlendedPrompt | None = None
        try:
            if self._documents is not None:
                computing = self._parts.client.links.computing(request=self.timeline)
                with computing, torch.inference_mode():
                    blended = self._segments.blend(self._documents, self.timeline)
            if blended is not None:
                generated = replace(run.over(blended.blend.kv), report=blended.report)
            elif self._documents is None and self.incoming is not None:
                generated = run.behind(self.incoming)
            else:
                generated = run.prefill()
            if blended is not None or self._parts.storing.is_aligned(generated):
                self._store(blended, generated)
            return CompletedCall(generated.output, self._report(blended, generated))
        except BaseException:
            self._store(blended, run.aborted)
            raise
        finally:
            self.cancel()

    def question_states(self) -> tuple[torch.Tensor, GenerationReport]:
        """Hidden states that leave the last layer for the question's tokens, `[1, tokens, hidden]`. Raises FetchError
        when stored chunks do not arrive. Releases all resources."""
        try:
            blended = None
            if self._documents is not None:
                blended = self._segments.blend(self._documents, self.timeline, question=True)
            if blended is None:
                raise FetchError(
                    f"too few of {len(self._plan.match.chunks)} stored chunks arrived to reuse them"
                )
            return blended.question, self._blended_report(blended)
        finally:
            self.cancel()

    def cancel(self) -> None:
        self._documents = None
        super().cancel()

    def _fetch_documents(self, plan: SegmentPlan) -> None:
        """Start to fetch the chunks of `plan`; does nothing when this process has no memory or thread for it."""
        rotary = self._parts.engine.rotary(len(self.call.tokens))
        segment_fetch = self._segments.start(
            plan, self.snapshot.spec, self.call.tokens, rotary, self.timeline
        )
        if segment_fetch is None:
            self.why_not = _NO_RESOURCES
            return
        self._documents = segment_fetch
        self.incoming = IncomingKV(segment_fetch.fetch, segment_fetch.buffers, self._parts.client.buffers)

    def _fetch_beginning(self) -> None:
        usable = exact_beginning(self._plan.match)
        self.why_not = self.why_not or "slower: computing is faster than reusing the documents"
        if usable.chunks:
            spec, timeline = self.snapshot.spec, self.timeline
            self.incoming, why_not = fetch_prefix(self._parts, usable, self.call, spec, timeline)
            self.why_not = why_not or self.why_not

    def _store(self, blended: BlendedPrompt | None, generated: GenerationResult | None) -> None:
        """Queue the documents' chunks that were not stored anywhere, while the buffers are held."""
        client, embed, tokens = self._parts.client, self._parts.engine.embed, self.call.tokens.tolist()
        new, report, features = [], None, client.store.needs_features
        if blended is not None:
            new, report = blended_chunks(embed, tokens, blended, features=features), blended.report
        elif generated is not None:
            new = prefilled_chunks(embed, tokens, self._plan, generated, features=features)
            report = generated.report
        encodings = self._parts.storing.encodings_behind(report)
        if new and encodings and self._parts.storing.may_store(self.snapshot):
            self._parts.storing.put(self.snapshot, new, encodings)

    def _report(self, blended: BlendedPrompt | None, generated: GenerationResult) -> GenerationReport:
        if blended is not None:
            return self._blended_report(blended)
        reused = generated.reused_tokens
        fetched = generated.report if self._documents is None else self._documents.fetch.finish()
        why_not = why_nothing_reused(reused, fetched, self.why_not)
        return GenerationReport(len(self.call.tokens), reused, self.timeline, fetched, why_not=why_not)

    def _blended_report(self, blended: BlendedPrompt) -> GenerationReport:
        chunks = blended.plan.chunks
        return GenerationReport(
            len(self.call.tokens),
            sum(len(chunk.tokens) for chunk in chunks) - blended.recomputed,
            self.timeline,
            blended.report,
            approximate_tokens=sum(len(chunk.tokens) for chunk in chunks if not chunk.exact),
            recomputed_tokens=blended.recomputed,
        )
