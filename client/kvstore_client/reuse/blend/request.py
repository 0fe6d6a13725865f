"""One prompt in segments, from what is stored of it to the KV of all its tokens but the last."""

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
    """Reused KV on its way."""

    plan: SegmentPlan
    tokens: torch.Tensor
    buffers: KVBuffers
    fetch: Fetch
    rotary: RotaryTable
    selected: torch.Tensor | None
    """What is computed again, where that is known beforehand."""


@dataclass(frozen=True, slots=True)
class Blended:
    """The KV of a prompt, some of it reused."""

    plan: SegmentPlan
    blend: Blend
    report: FetchReport
    recomputed: int
    """Reused tokens that were computed again."""
    question: torch.Tensor
    """What left the last layer for the question's tokens, `[1, tokens, hidden]`; empty unless it was asked for."""


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
        """Looks up what is stored. Without `recompute`, how it is repaired follows from where it is stored. Raises
        InvalidTokensError for segments that do not make the prompt."""
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
        """What `plan` would find, not leased, and not counted as used."""
        return self._client.match_segments(spec, self._placed(spec, tokens, segments)[0], peek=True)

    def worth(self, plan: SegmentPlan, total: int) -> SegmentPlan | None:
        """The plan as it is best carried out; None when the prompt is better prefilled."""
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
        """Have what is reused of `tokens`, i64 `[tokens]`, come. None when this process has no memory or thread
        left for it; the match is then still to be released."""
        chosen, recompute = None, plan.recompute
        choose = selector(recompute.selector)
        if not choose.needs_kv:
            chosen = select(choose, plan.chunks, len(tokens), recompute.ratio)
        # What drift is measured by has to come, too.
        computed = skipped(chosen) if chosen is not None and not recompute.drift else []
        buffers: KVBuffers | None = None
        try:
            buffers = self._client.buffers.take(spec, len(tokens))
            features = PromptFeatures(self._embed, tokens, [c.first_token for c in plan.match.chunks])
            fetch = self._client.fetch(plan.match, buffers, rotary, timeline, features, computed=computed)
        except (RuntimeError, MemoryError) as error:
            self._no_resources("fetch", len(plan.match.chunks), error)
            if buffers is not None:
                self._client.buffers.give_back(buffers)
            return None
        if self._costs is not None and plan.prefill_s is not None:
            FetchWatchdog(fetch, sum(chunk.body_bytes for chunk in plan.match.chunks), plan.prefill_s).start()
        return SegmentFetch(plan, tokens, buffers, fetch, rotary[0], chosen)

    def blend(self, coming: SegmentFetch, timeline: Timeline, *, question: bool = False) -> Blended | None:
        """Compute what is to be computed as the rest arrives. None when too little of it came, or too late to choose
        anew, or this process has no memory left: the prompt is then to be prefilled. With `question` the question's
        last token is computed, too."""
        try:
            return self._blend_what_comes(coming, timeline, question=question)
        except (RuntimeError, MemoryError) as error:  # a device without memory is a RuntimeError
            self._no_resources("reuse", len(coming.plan.match.chunks), error)
            coming.fetch.cancel()
            return None

    def _blend_what_comes(
        self, coming: SegmentFetch, timeline: Timeline, *, question: bool
    ) -> Blended | None:
        try:
            return self._blend(coming, coming.plan, coming.selected, timeline, question=question)
        except _ChoiceFailedError:
            report = coming.fetch.wait()
        except FetchIncompleteError:
            coming.fetch.cancel()  # the rest would come for nothing
            return None
        came = tuple(c for i, c in enumerate(coming.plan.match.chunks) if i not in report.missing)
        plan = replace(coming.plan, match=Match(came))
        if self.worth(plan, len(coming.tokens)) is None:
            return None
        return self._blend(coming, plan, None, timeline, question=question)

    def _no_resources(self, verb: str, chunks: int, error: Exception) -> None:
        detail = f"cannot {verb} {chunks} chunks, which are computed: {error}"
        self._client.metrics.missed(MissReason.NO_RESOURCES, chunks, detail=detail)

    def _placed(
        self, spec: ModelSpec, tokens: Sequence[int], segments: Sequence[int]
    ) -> tuple[tuple[PlacedChunk, ...], int]:
        return documents_of(self._client.segment_chunks(spec, tokens, segments), segments)

    def _blend(
        self,
        coming: SegmentFetch,
        plan: SegmentPlan,
        selected: torch.Tensor | None,
        timeline: Timeline,
        *,
        question: bool,
    ) -> Blended:
        is_whole, arrives = plan is coming.plan, layers_of(coming.fetch, timeline)

        def arrived(layer: int) -> None:
            if is_whole:  # otherwise what did not come was waited for
                arrives(layer)

        blend = Blend(
            self._decoder, coming.tokens, plan.chunks, plan.question, coming.buffers, coming.rotary, arrived,
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
        if (
            coming.selected is not None and self._decoder.device.type == "cpu"
        ):  # others compute behind the call
            computed = len(coming.tokens) - plan.match.tokens + len(selected)
            self._ratios.computed(computed, timeline.busy_s("compute"))
        return Blended(plan, blend, coming.fetch.finish(), len(selected), hidden)


class _ChoiceFailedError(FetchIncompleteError):
    """Nothing of what was reused has been written over yet."""
