"""One segmented prompt: from its lookup to the KV of all its tokens but the last."""

import itertools
import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from kvstore_client.buffers import KVBuffers
from kvstore_client.client import KVStoreClient
from kvstore_client.fetch import Fetch, FetchReport
from kvstore_client.match import Match
from kvstore_client.miss_reason import MissReason
from kvstore_client.planning import Costs
from kvstore_client.recompute import Recompute, select, selector
from kvstore_client.reuse.blend.executor import Blend
from kvstore_client.reuse.blend.fetch_watchdog import FetchWatchdog
from kvstore_client.reuse.blend.plan import (
    SegmentPlan,
    chunk_tokens,
    documents_of,
    skipped,
    without_false_beginning,
)
from kvstore_client.reuse.blend.ratio import Ratios
from kvstore_client.reuse.blend.worth import worth_reusing
from kvstore_client.reuse.engine import DecoderLayers, TokenEmbeddings
from kvstore_client.reuse.features import PromptFeatures
from kvstore_client.reuse.incoming import layers_of
from kvstore_client.timeline import Timeline
from kvstore_codec.errors import FetchIncompleteError
from kvstore_codec.identity import PlacedChunk
from kvstore_codec.model_spec import ModelSpec
from kvstore_codec.rope import RotaryTable


@dataclass(slots=True)
class SegmentFetch:
    """A fetch of reused chunks in progress."""

    plan: SegmentPlan
    tokens: torch.Tensor
    buffers: KVBuffers
    fetch: Fetch
    rotary: RotaryTable
    selected: torch.Tensor | None
    """Positions to recompute, where they are known before the fetch."""


@dataclass(frozen=True, slots=True)
class BlendedPrompt:
    """KV of a prompt, partly reused."""

    plan: SegmentPlan
    blend: Blend
    report: FetchReport
    recomputed: int
    """Number of reused tokens that were recomputed."""
    question: torch.Tensor
    """Hidden states that leave the last layer for the question's tokens, `[1, tokens, hidden]`; empty unless
    requested."""


class SegmentReuse:
    """Looks up, fetches and blends prompts for one model."""

    def __init__(
        self, decoder: DecoderLayers, embed: TokenEmbeddings, client: KVStoreClient, costs: Costs | None
    ) -> None:
        self._decoder, self._embed = decoder, embed
        self._client, self._costs = client, costs
        self._ratios = Ratios(client.settings, client.links)

    def plan(
        self,
        spec: ModelSpec,
        tokens: Sequence[int],
        segments: Sequence[int],
        recompute: Recompute | None,
        timeline: Timeline,
    ) -> SegmentPlan:
        """Look up the stored chunks. Without `recompute`, the storage tier decides how they are repaired. Raises
        InvalidTokensError for segments that do not sum to the prompt."""
        placed, question = self._placed(spec, tokens, segments)
        match = without_false_beginning(self._client.match_segments(spec, placed, timeline))
        try:
            recompute = recompute or self._ratios.recompute(spec.digest, match)
        except BaseException:
            self._client.release(match)
            raise
        stored = frozenset(chunk.first_token for chunk in match.chunks)
        begins = tuple(itertools.accumulate(map(operator.index, segments), initial=0))
        return SegmentPlan(placed, question, recompute, begins, match, stored)

    def peek(self, spec: ModelSpec, tokens: Sequence[int], segments: Sequence[int]) -> Match:
        """The match that `plan` would find, without a lease and without counting as a use."""
        return self._client.match_segments(spec, self._placed(spec, tokens, segments)[0], peek=True)

    def worth(self, plan: SegmentPlan, total: int) -> SegmentPlan | None:
        """The plan with its best encodings; None when a prefill is faster."""
        profile = self._costs.snapshot() if self._costs is not None else None
        return worth_reusing(plan, total, profile, self._client.links, self._client.settings.fetch.decoders)

    def start(
        self,
        plan: SegmentPlan,
        spec: ModelSpec,
        tokens: torch.Tensor,
        rotary: tuple[RotaryTable, ...],
        timeline: Timeline,
    ) -> SegmentFetch | None:
        """Start to fetch the reused chunks of `tokens`, i64 `[tokens]`. None when this process has no memory or thread
        for it; the caller then releases the match."""
        chosen, recompute = None, plan.recompute
        choose = selector(recompute.selector)
        if not choose.needs_kv:
            chosen = select(choose, plan.chunks, len(tokens), recompute.ratio)
        # Drift is measured against stored KV, so the recomputed tokens are fetched, too.
        computed = skipped(chosen) if chosen is not None and not recompute.drift else []
        buffers: KVBuffers | None = None
        try:
            buffers = self._client.buffers.acquire(spec, len(tokens))
            features = PromptFeatures(self._embed, tokens, [c.first_token for c in plan.match.chunks])
            fetch = self._client.fetch(plan.match, buffers, rotary, timeline, features, computed=computed)
        except (RuntimeError, MemoryError) as error:
            self._no_resources("fetch", len(plan.match.chunks), error)
            if buffers is not None:
                self._client.buffers.release(buffers)
            return None
        if self._costs is not None and plan.prefill_s is not None:
            FetchWatchdog(fetch, sum(chunk.body_bytes for chunk in plan.match.chunks), plan.prefill_s).start()
        return SegmentFetch(plan, tokens, buffers, fetch, rotary[0], chosen)

    def blend(
        self, segment_fetch: SegmentFetch, timeline: Timeline, *, question: bool = False
    ) -> BlendedPrompt | None:
        """Compute the remaining tokens while the reused KV arrives. None when too little of it arrived, or too late to
        select again, or this process has no memory left: the caller then prefills the prompt. With `question` the
        question's last token is computed, too."""
        try:
            return self._blend_arrived(segment_fetch, timeline, question=question)
        except (RuntimeError, MemoryError) as error:  # an out-of-memory device raises RuntimeError
            self._no_resources("reuse", len(segment_fetch.plan.match.chunks), error)
            segment_fetch.fetch.cancel()
            return None

    def _blend_arrived(
        self, segment_fetch: SegmentFetch, timeline: Timeline, *, question: bool
    ) -> BlendedPrompt | None:
        try:
            return self._blend(
                segment_fetch, segment_fetch.plan, segment_fetch.selected, timeline, question=question
            )
        except _ChoiceFailedError:
            report = segment_fetch.fetch.wait()
        except FetchIncompleteError:
            segment_fetch.fetch.cancel()  # the rest would arrive for nothing
            return None
        came = tuple(c for i, c in enumerate(segment_fetch.plan.match.chunks) if i not in report.missing)
        plan = replace(segment_fetch.plan, match=Match(came))
        if self.worth(plan, len(segment_fetch.tokens)) is None:
            return None
        return self._blend(segment_fetch, plan, None, timeline, question=question)

    def _no_resources(self, verb: str, chunks: int, error: Exception) -> None:
        detail = f"cannot {verb} {chunks} chunks, which are computed: {error}"
        self._client.metrics.missed(MissReason.NO_RESOURCES, chunks, detail=detail)

    def _placed(
        self, spec: ModelSpec, tokens: Sequence[int], segments: Sequence[int]
    ) -> tuple[tuple[PlacedChunk, ...], int]:
        return documents_of(self._client.segment_chunks(spec, tokens, segments), segments)

    def _blend(
        self,
        segment_fetch: SegmentFetch,
        plan: SegmentPlan,
        selected: torch.Tensor | None,
        timeline: Timeline,
        *,
        question: bool,
    ) -> BlendedPrompt:
        is_whole, arrives = plan is segment_fetch.plan, layers_of(segment_fetch.fetch, timeline)

        def arrived(layer: int) -> None:
            if is_whole:  # otherwise the fetch has ended already
                arrives(layer)

        blend = Blend(
            self._decoder, segment_fetch.tokens, plan.chunks, plan.question,
            segment_fetch.buffers, segment_fetch.rotary, arrived,
            keep=[chunk_tokens(chunk) for chunk in plan.unstored],
        )  # fmt: skip
        recompute = plan.recompute
        if selected is None:
            try:
                with timeline.span("compute", "choosing tokens"):
                    selected = blend.choose(selector(recompute.selector), recompute.ratio)
            except FetchIncompleteError as error:
                raise _ChoiceFailedError(str(error)) from error
        with timeline.span("compute", f"{len(selected)} tokens again"):
            hidden = blend.compute(selected, drift=recompute.drift, question=question)
        # Other devices still work when the call returns.
        if segment_fetch.selected is not None and self._decoder.device.type == "cpu":
            computed = len(segment_fetch.tokens) - plan.match.tokens + len(selected)
            self._ratios.computed(computed, timeline.busy_s("compute"))
        return BlendedPrompt(plan, blend, segment_fetch.fetch.finish(), len(selected), hidden)


class _ChoiceFailedError(FetchIncompleteError):
    """Raised before any reused KV was overwritten."""
