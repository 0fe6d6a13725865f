"""`CachedModel`: a transformers model that reuses KV which any worker has computed before."""

import logging
import os
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel

from kvstore_client.buffers import KVBuffers
from kvstore_client.canaries import FINAL
from kvstore_client.client import KVStoreClient
from kvstore_client.engines.transformers.bypass import bypass_reason, mode_reason
from kvstore_client.engines.transformers.cache import (
    arriving_cache,
    computed_values,
    empty_cache,
    make_plain,
    placed_cache,
    whole_tokens,
)
from kvstore_client.engines.transformers.canary import ModelCanary
from kvstore_client.engines.transformers.capture import install_hooks
from kvstore_client.engines.transformers.costs import costs_of
from kvstore_client.engines.transformers.decoder import Decoder
from kvstore_client.engines.transformers.features import embedded
from kvstore_client.engines.transformers.identity.guard import Described, ModelIdentity
from kvstore_client.engines.transformers.pending import PendingGeneration
from kvstore_client.engines.transformers.rotary import rotary_tables
from kvstore_client.engines.transformers.spec import loaded_model
from kvstore_client.fetch import Computing
from kvstore_client.match import Match
from kvstore_client.miss_reason import MissReason
from kvstore_client.recompute import Recompute
from kvstore_client.reuse.blend import (
    Blended,
    SegmentPlan,
    SegmentReuse,
    blended_chunks,
    exact_beginning,
    prefilled_chunks,
)
from kvstore_client.reuse.capture import KeyCapture
from kvstore_client.reuse.features import PromptFeatures
from kvstore_client.reuse.generated import ComputedRun, Generated, new_chunks
from kvstore_client.reuse.report import GenerationReport, why_nothing_reused
from kvstore_client.timeline import Timeline
from kvstore_codec.errors import FetchError, FetchIncompleteError, NotCopyableError, UnsupportedModelError
from kvstore_codec.identity import CHUNK_TOKENS
from kvstore_codec.model_spec import ModelSpec
from kvstore_codec.rope import RotaryTable

log = logging.getLogger(__name__)

_UNALIGNED = "what a call computed is not stored: the keys of some of its tokens were not seen"


class CachedModel:
    """Wraps a causal language model of the Llama, Qwen2, Qwen3, Mistral or Gemma 3 (text) family.

    `generate` takes what the model's own takes and returns what it returns. Tokens whose KV is stored are fetched
    instead of computed, layer by layer under the computation of the rest; what was computed is stored afterwards in
    the background. Whatever the service does, the answer comes: what does not arrive is computed.

    The wrapped model is not changed but for hooks on its key projections, which `close` takes off again. Raises
    UnsupportedModelError for a model whose KV cannot be reused.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        client: KVStoreClient,
        *,
        model_id: str | None = None,
        store: bool = True,
    ) -> None:
        self.model = model = loaded_model(model)
        self.client = client
        self.store = store
        self._identity = ModelIdentity(model, model_id)
        self._costs = costs_of(model, self.spec, client)
        """What planning goes by; None when nothing is planned."""
        self._embed = partial(embedded, model)
        self._decoder = _decoder_of(model)
        """None for a model of which only the beginning of a prompt can be reused."""
        self._segments = None
        if self._decoder is not None:
            self._segments = SegmentReuse(self._decoder, self._embed, client, self._costs)
        self.last_report = GenerationReport(0, 0, Timeline())
        """What the latest `generate` reused; empty before the first."""
        self._hooks = install_hooks(model)
        self._described = self._identity.current()
        # MKL's first cosine in a process is off by 2e-4 in some threads when several compute it at once (seen in
        # about one start of fifteen), and the model's would be that one. One position takes one thread only.
        self._rotary(1)
        self.canary = ModelCanary(model, client, self._identity)
        """Whether the model computes what the cluster's KV was computed with; calls wait for its first verdict."""
        self.canary.watch(self.spec)
        client.prepare(self.spec)
        client.buffers.reserve(model.config.max_position_embeddings * self.spec.kv_bytes_per_token)

    @property
    def spec(self) -> ModelSpec:
        """What names this model's chunks; another one once the model computes something else."""
        return self._identity.spec

    def generate(
        self,
        input_ids: torch.Tensor | None = None,
        generation_config: Any = None,
        *,
        segments: Sequence[int] | None = None,
        recompute: Recompute | None = None,
        **arguments: Any,
    ) -> Any:
        """Like the model's own `generate`; reuses for `input_ids` of `[1, tokens]` and plain decoding or sampling.

        Other calls are passed on as they are, and `last_report.bypassed` says why.

        `segments` are the lengths of neighbouring parts of the prompt, which sum to its tokens: a beginning that all
        prompts share, documents, and last the question. Then a document is found again wherever it stands, and what is
        reused in another context than its own is repaired as `recompute` says (when not given: as the client's settings
        say, with the share of tokens that was tuned for where it is stored).
        Raises InvalidTokensError for segments that do not make the prompt.
        """
        if input_ids is None:
            input_ids = arguments.pop("inputs", None)
        if generation_config is not None:
            arguments["generation_config"] = generation_config
        return self._complete(self.begin(input_ids, segments=segments, recompute=recompute, **arguments))

    def begin(
        self,
        input_ids: torch.Tensor | None,
        *,
        segments: Sequence[int] | None = None,
        recompute: Recompute | None = None,
        **arguments: Any,
    ) -> PendingGeneration:
        """The first half of `generate`: what is stored of the prompt is looked up, and begins to come. Nothing is
        computed and nothing waited for but the lookup, so a prompt whose KV is on its way need not hold up another
        (`PendingGeneration.on_ready`). Hand it to `finish`, or to `cancel`."""
        timeline = Timeline()
        reason = bypass_reason(self.model, input_ids, arguments)
        if reason is not None or input_ids is None:
            return PendingGeneration(input_ids, arguments, timeline, bypassed=reason)
        described = self._current(input_ids)
        if described.refusal is not None:
            return PendingGeneration(input_ids, arguments, timeline, bypassed=described.refusal.reason)
        refusal = self._refusal(self.client.settings.timeouts.canary_s)
        if refusal in FINAL:
            return PendingGeneration(
                input_ids, arguments, timeline, bypassed=refusal, why_not=self.canary.why(refusal)
            )
        pending = PendingGeneration(
            input_ids, arguments, timeline, described=described, generation=self._generation
        )
        pending.again = {"segments": segments, "recompute": recompute}
        if refusal is not None:
            self._require_segments(input_ids, segments)
            pending.compared, pending.why_not = False, self.canary.count(refusal)
            return pending
        match, usable = Match(), Match()
        try:
            if self._segments is not None and segments is not None and len(segments) > 1:
                pending.segments = self._segments.plan(
                    self.spec, input_ids[0].tolist(), segments, recompute, timeline
                )
                match = pending.segments.match
                better = self._segments.worth(pending.segments, input_ids.shape[1])
                if better is not None:
                    rotary = self._rotary(input_ids.shape[1])
                    pending.coming = self._segments.start(better, self.spec, input_ids[0], rotary, timeline)
                else:
                    usable = exact_beginning(match)
                    pending.why_not = (
                        match.why_not or "slower: computing is sooner than reusing the documents"
                    )
            else:
                usable = match = self._match_prefix(input_ids, segments, timeline)
                pending.why_not = match.why_not
            if usable.chunks:
                self._start_fetch(pending, usable, input_ids[0])
        finally:
            if pending.fetch is None and pending.coming is None:
                self.client.release(match)
        return pending

    def is_stored(
        self,
        input_ids: torch.Tensor | None,
        *,
        segments: Sequence[int] | None = None,
        recompute: Recompute | None = None,
        **arguments: Any,
    ) -> bool:
        """Whether `begin`, called like this, would find anything to fetch. Raises as it does."""
        del recompute
        if input_ids is None or bypass_reason(self.model, input_ids, arguments) is not None:
            return False
        if self._identity.current(input_ids).refusal is not None:
            return False
        if self._refusal(self.client.settings.timeouts.lookup_s) is not None:
            self._require_segments(input_ids, segments)
            return False
        if self._segments is not None and segments is not None and len(segments) > 1:
            match = self._segments.peek(self.spec, input_ids[0].tolist(), segments)
        else:
            match = self._match_prefix(input_ids, segments, peek=True)
        return bool(match.chunks)

    def finish(self, pending: PendingGeneration) -> Any:
        """The second half of `generate`, with its result."""
        if pending.described is not None:
            described = self._current()
            current = described == pending.described and pending.generation == self._generation
            if current and pending.process == os.getpid() and mode_reason(self.model) is None:
                pending.described = described
            else:  # what is on its way is of no use: to another model, process (a forked one) or mode of torch
                self.cancel(pending)
                pending = self.begin(pending.input_ids, **pending.again, **pending.arguments)
        return self._complete(pending)

    def _complete(self, pending: PendingGeneration) -> Any:
        input_ids, timeline = pending.input_ids, pending.timeline
        if pending.bypassed is not None or input_ids is None:
            self.client.metrics.missed(MissReason.of_bypass(pending.bypassed or "batch"))
            self.last_report = GenerationReport(
                0 if input_ids is None else input_ids.numel(),
                0,
                timeline,
                bypassed=pending.bypassed,
                why_not=pending.why_not or f"bypassed: {pending.bypassed}",
            )
            return self.model.generate(input_ids, **pending.arguments)
        if pending.segments is not None:
            return self._finish_segments(pending, pending.segments, input_ids)
        try:
            generated = self._generate(pending, input_ids)
        except BaseException:
            if pending.aborted is not None and self._may_store(pending):
                self._store_new(pending, input_ids[0, : pending.aborted.tokens].tolist(), pending.aborted)
            raise
        output, total = generated.output, input_ids.shape[1]
        reused = generated.reused_tokens
        self.client.metrics.prompt(reused_tokens=reused, computed_tokens=total - reused)
        self.last_report = GenerationReport(
            total,
            reused,
            timeline,
            generated.report,
            why_not=why_nothing_reused(reused, generated.report, pending.why_not),
        )
        if self._may_store(pending) and self._is_aligned(generated):
            sequence = output if isinstance(output, torch.Tensor) else output.sequences
            self._store_new(pending, sequence[0, : generated.tokens].tolist(), generated)
        return output

    def cancel(self, pending: PendingGeneration) -> None:
        """Nobody will finish it. Safe to call more than once, and afterwards."""
        fetch, buffers = pending.take_back()
        if fetch is not None:
            fetch.cancel()
        if buffers is not None:
            self.client.buffers.give_back(buffers)

    @torch.inference_mode()
    def question_log_probabilities(
        self, input_ids: torch.Tensor, *, segments: Sequence[int], recompute: Recompute | None = None
    ) -> torch.Tensor:
        """What the model says at each token of the last segment, f32 `[tokens, vocabulary]`, when the rest is reused as
        `generate` would, however much of it has to be computed: for measuring what reuse does to the answer. Raises
        UnsupportedModelError where segments cannot be reused, and FetchError when what is stored does not come."""
        if self._segments is None or self._decoder is None:
            raise UnsupportedModelError(f"segments of {self.spec.model_id} cannot be reused")
        refusal = self._current().refusal
        if refusal is not None:
            raise UnsupportedModelError(f"{self.spec.model_id}: {refusal.detail}")
        if (reason := self._refusal(self.client.settings.timeouts.canary_s)) is not None:
            raise FetchError(f"nothing may be reused: {self.canary.why(reason)}")
        timeline, tokens = Timeline(), input_ids[0]
        plan = self._segments.plan(self.spec, tokens.tolist(), segments, recompute, timeline)
        coming = self._segments.start(plan, self.spec, tokens, self._rotary(len(tokens)), timeline)
        if coming is None:
            self.client.release(plan.match)
            raise FetchError("there is no memory or thread left to fetch with")
        pending = PendingGeneration(input_ids, {}, timeline, plan.match, segments=plan, coming=coming)
        try:
            blended = self._segments.blend(coming, timeline, question=True)
            if blended is None:
                raise FetchError(f"of {len(plan.match.chunks)} stored chunks too few came to reuse them")
            self.last_report = self._report(blended, pending, len(tokens))
            return self._decoder.log_probabilities(blended.question)
        finally:
            self.cancel(pending)

    def __reduce_ex__(self, protocol: object) -> str:
        raise NotCopyableError(
            "a CachedModel is bound to its model's hooks and its client's connections and cannot be copied or pickled; "
            "copy or save `cached.model`, and wrap the copy: CachedModel(copy, client)"
        )

    def close(self) -> None:
        """Take the hooks off the model, and end its comparison with the canary. The client stays open."""
        self.canary.close()
        self._unwatch_keys()

    def _current(self, token_ids: torch.Tensor | None = None) -> Described:
        """What the model is now, the embeddings of these tokens in particular. Prepares for it when it is another than
        it was."""
        described = self._identity.current(token_ids)
        if described != self._described:
            self._watch_keys()  # modules may be others than those that were watched
            self.canary.watch(described.spec)
            self.client.prepare(described.spec)
            described = self._described = self._identity.current()
        return described

    def _may_store(self, pending: PendingGeneration) -> bool:
        """Whether the model is still what the call began with (KV that another one computed has another name), and its
        canary agrees now, and is the one that the call read by, if it read."""
        if not self.store or pending.described is None:
            return False
        if not self._holds(pending.described.still_holds()):
            return False
        refusal = self._refusal(0)
        if refusal is None and pending.compared and pending.generation != self._generation:
            refusal = "canary_replaced"
        if refusal is not None:
            self.canary.count(refusal, storing=True)
        return refusal is None

    def _rows_hold(self, pending: PendingGeneration) -> bool:
        return pending.described is not None and self._holds(pending.described.rows_hold())

    def _holds(self, unchanged: bool) -> bool:
        if not unchanged:
            detail = "what a call computed is not stored: its model was changed meanwhile"
            self.client.metrics.missed(MissReason.STORE_MODEL_CHANGED, detail=detail)
        return unchanged

    @property
    def _generation(self) -> int:
        return self.client.canaries.generation(self.spec.digest)

    def _refusal(self, wait_s: float) -> str | None:
        return self.canary.refusal(self.spec, wait_s=wait_s)

    def _watch_keys(self) -> None:
        self._unwatch_keys()
        try:
            self._hooks = install_hooks(self.model)
        except UnsupportedModelError as error:  # nothing can be stored; what is stored may be read
            log.warning("%s", error)

    def _unwatch_keys(self) -> None:
        while self._hooks:
            self._hooks.pop().remove()

    def _match_prefix(
        self,
        input_ids: torch.Tensor,
        segments: Sequence[int] | None,
        timeline: Timeline | None = None,
        *,
        peek: bool = False,
    ) -> Match:
        """What is stored of the beginning of a prompt, whose segments count only in so far as they must be right."""
        self._require_segments(input_ids, segments)
        tokens: list[int] = input_ids[0].tolist()
        return self.client.match(self.spec, self.client.chunk_ids(self.spec, tokens), timeline, peek=peek)

    def _require_segments(self, input_ids: torch.Tensor, segments: Sequence[int] | None) -> None:
        """Raises InvalidTokensError for segments that do not make the prompt."""
        if segments is not None:
            self.client.segment_chunks(self.spec, input_ids[0].tolist(), segments)

    def _finish_segments(self, pending: PendingGeneration, plan: SegmentPlan, input_ids: torch.Tensor) -> Any:
        tokens: list[int] = input_ids[0].tolist()
        blended, coming = None, pending.coming
        try:
            if pending.coming is not None and self._segments is not None:
                computing = self.client.links.computing(request=pending.timeline)
                with computing, torch.inference_mode():
                    blended = self._segments.blend(pending.coming, pending.timeline)
            if blended is None:
                generated = self._generate(pending, input_ids)
            else:
                capture = self._capture(len(tokens) - 1)
                generated = self._run(pending, input_ids, placed_cache(blended.blend.kv, capture), capture)
                generated = replace(generated, report=blended.report)
            if blended is not None or self._is_aligned(generated):
                self._store_segments(pending, plan, tokens, blended, generated)
        except BaseException:
            self._store_segments(pending, plan, tokens, blended, pending.aborted)
            raise
        finally:
            self.cancel(pending)
        if blended is not None:
            self.last_report = self._report(blended, pending, len(tokens))
        else:
            report = generated.report if coming is None else coming.fetch.finish()
            reused = generated.reused_tokens
            self.last_report = GenerationReport(
                len(tokens),
                reused,
                pending.timeline,
                report,
                why_not=why_nothing_reused(reused, report, pending.why_not),
            )
        reused, output = self.last_report.reused_tokens, generated.output
        self.client.metrics.prompt(reused_tokens=reused, computed_tokens=len(tokens) - reused)
        return output

    def _store_segments(
        self,
        pending: PendingGeneration,
        plan: SegmentPlan,
        tokens: list[int],
        blended: Blended | None,
        generated: Generated | None,
    ) -> None:
        """What a prompt in segments leaves to be stored; called while its buffers are held."""
        new, report, features = [], None, self.client.store.needs_features
        if blended is not None:
            new, report = blended_chunks(self._embed, tokens, blended, features=features), blended.report
        elif generated is not None:
            new = prefilled_chunks(self._embed, tokens, plan, generated, features=features)
            report = generated.report
        encodings = self.client.store.encodings_behind(report.encodings if report is not None else ())
        if new and encodings and self._may_store(pending) and self._rows_hold(pending):
            self.client.store.put(pending.spec, new, encodings)

    def _report(self, blended: Blended, pending: PendingGeneration, total: int) -> GenerationReport:
        chunks = blended.plan.chunks
        return GenerationReport(
            total,
            sum(len(chunk.tokens) for chunk in chunks) - blended.recomputed,
            pending.timeline,
            blended.report,
            approximate_tokens=sum(len(chunk.tokens) for chunk in chunks if not chunk.exact),
            recomputed_tokens=blended.recomputed,
        )

    def _generate(self, pending: PendingGeneration, input_ids: torch.Tensor) -> Generated:
        if pending.fetch is None or pending.buffers is None:
            capture = self._capture(0)
            generated = self._run(pending, input_ids, empty_cache(capture, self.spec.layers), capture)
            self._learn(capture, input_ids.shape[1])
            return generated
        fetch, buffers = pending.fetch, pending.buffers
        runs: list[ComputedRun] = []
        try:
            while True:
                while (run := fetch.next_to_compute()) is not None:
                    runs.append(self._compute(pending, input_ids, run))
                    fetch.computed(*run)
                # At least one token must pass through the model: its logits are what comes next.
                capture = self._capture(min(fetch.reusable_tokens, input_ids.shape[1] - 1))
                if not capture.first_token:
                    fetch.finish()
                    cache = empty_cache(capture, self.spec.layers)
                else:
                    cache = arriving_cache(buffers, capture, fetch, pending.timeline)
                began_s = pending.timeline.now_s()
                try:
                    generated = self._run(pending, input_ids, cache, capture)
                except FetchIncompleteError:
                    continue
                report = fetch.finish()
                if self.model.device.type == "cpu" and capture.first_token:
                    fetch.learn(began_s, began_s + capture.first_pass_s)
                return generated.behind(report, runs, buffers)
        except BaseException:
            if pending.aborted is not None:
                pending.aborted = pending.aborted.behind(fetch.finish(), runs, buffers)
            raise
        finally:
            self.cancel(pending)

    def _compute(
        self, pending: PendingGeneration, input_ids: torch.Tensor, run: tuple[int, int]
    ) -> ComputedRun:
        """Put the KV of a run of chunks into the buffers, where all before them lies."""
        first, end = run
        capture = self._capture(first * CHUNK_TOKENS)
        buffers, tokens = pending.buffers, slice(first * CHUNK_TOKENS, end * CHUNK_TOKENS)
        if buffers is None:
            raise RuntimeError("nothing is fetched, so nothing is computed in its place")
        with (
            pending.timeline.span("compute", f"chunks {first}-{end - 1}"),
            capture.active(),
            self.client.links.computing(),
            torch.inference_mode(),
        ):
            self.model.get_decoder()(
                input_ids=input_ids[:, tokens], past_key_values=placed_cache(buffers, capture), use_cache=True
            )
        return ComputedRun(range(first, end), capture)

    def _start_fetch(self, pending: PendingGeneration, match: Match, tokens: torch.Tensor) -> None:
        """Have the beginning of a prompt come, unless this process has no memory or thread left for it."""
        buffers: KVBuffers | None = None
        try:
            buffers = self.client.buffers.take(self.spec, len(tokens))  # what is computed goes behind it
            rotary, features = self._rotary(match.tokens), PromptFeatures(self._embed, tokens)
            computing = None
            if self._costs is not None:
                computing = Computing(self._costs, match.tokens, len(tokens) - match.tokens)
            pending.fetch = self.client.fetch(match, buffers, rotary, pending.timeline, features, computing)
            pending.match, pending.buffers = match, buffers
        except (RuntimeError, MemoryError) as error:
            pending.why_not = f"no_resources: {error}"
            detail = f"cannot fetch {len(match.chunks)} chunks, which are computed: {error}"
            self.client.metrics.missed(MissReason.NO_RESOURCES, len(match.chunks), detail=detail)
            if buffers is not None:
                self.client.buffers.give_back(buffers)

    def _capture(self, first_token: int) -> KeyCapture:
        return KeyCapture(self.spec.layers, first_token)

    def _run(
        self, pending: PendingGeneration, input_ids: torch.Tensor, cache: DynamicCache, capture: KeyCapture
    ) -> Generated:
        # A few tokens wait for what is fetched; more of them keep the processor from those who bring it.
        waits = input_ids.shape[1] - capture.first_token < CHUNK_TOKENS
        computing = self.client.links.computing(request=pending.timeline, waits=waits)
        with pending.timeline.span("compute"), capture.active(), computing:
            try:
                output = self.model.generate(input_ids, past_key_values=cache, **pending.next_arguments())
            except FetchIncompleteError:
                raise
            except BaseException:  # a streamer whose client has gone, say: what was computed is worth keeping
                tokens = min(whole_tokens(cache, capture), input_ids.shape[1])
                if self.store and tokens > capture.first_token:
                    values = computed_values(cache, capture.first_token)
                    pending.aborted = Generated(None, tokens, values, capture)
                raise
        is_kept = getattr(output, "past_key_values", None) is not None
        if is_kept:
            make_plain(cache)
        values = computed_values(cache, capture.first_token) if self.store else ()
        generated = Generated(output, cache.get_seq_length(), values, capture)
        if not is_kept:
            cache.layers.clear()  # nobody shall find in it what is put into the buffers next
        return generated

    def _learn(self, capture: KeyCapture, tokens: int) -> None:
        """How long a prompt took that was computed alone. On other devices the call returns before the work is done."""
        if self._costs is not None and self.model.device.type == "cpu" and capture.first_pass_s:
            self._costs.observe_prefill(0, tokens, capture.first_pass_s)

    def _rotary(self, tokens: int) -> tuple[RotaryTable, ...]:
        return rotary_tables(self.model, tokens, self.spec.dtype.torch, "cpu")

    def _is_aligned(self, generated: Generated) -> bool:
        aligned = generated.capture.reaches(generated.tokens)
        if not aligned:
            self.client.metrics.missed(MissReason.STORE_UNALIGNED, detail=_UNALIGNED)
        return aligned

    def _store_new(self, pending: PendingGeneration, tokens: list[int], generated: Generated) -> None:
        report = generated.report
        encodings = self.client.store.encodings_behind(report.encodings if report is not None else ())
        if not encodings:
            self.client.metrics.missed(MissReason.STORE_BEHIND_LOSSY)
            return
        ids = self.client.chunk_ids(pending.spec, tokens)
        stored = set(range(len(pending.match.chunks)))
        if report is not None:
            stored.difference_update(report.missing)
        chunks = new_chunks(
            self._embed, tokens, ids, stored, generated, features=self.client.store.needs_features
        )
        if chunks and self._rows_hold(pending):
            self.client.store.put(pending.spec, chunks, encodings, text=ids)


def _decoder_of(model: PreTrainedModel) -> Decoder | None:
    try:
        return Decoder(model)
    except UnsupportedModelError as error:
        log.info("%s", error)
        return None
