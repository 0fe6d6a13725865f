"""Reuse of a prompt's prefix."""

from kvstore_client.buffers import KVBuffers
from kvstore_client.fetch import Computing
from kvstore_client.match import Match
from kvstore_client.miss_reason import MissReason
from kvstore_client.reuse.call import EngineCall
from kvstore_client.reuse.features import PromptFeatures
from kvstore_client.reuse.generated import GenerationResult, new_chunks
from kvstore_client.reuse.identity import ModelSnapshot
from kvstore_client.reuse.incoming import IncomingKV
from kvstore_client.reuse.parts import SessionParts
from kvstore_client.reuse.pending import CompletedCall, ReusingGeneration
from kvstore_client.reuse.prompt_run import PromptRun
from kvstore_client.reuse.report import GenerationReport, why_nothing_reused
from kvstore_client.reuse.summaries import publish_summaries
from kvstore_client.timeline import Timeline
from kvstore_codec.codec import chunk_geometry
from kvstore_codec.encoding import Encoding
from kvstore_codec.errors import ChunkFormatError
from kvstore_codec.geometry import Geometry
from kvstore_codec.identity import CHUNK_TOKENS
from kvstore_codec.model_spec import ModelSpec


class PrefixGeneration(ReusingGeneration):
    """A call that reuses the stored chunks from its prompt's first token on, or nothing."""

    def __init__(
        self,
        parts: SessionParts,
        call: EngineCall,
        snapshot: ModelSnapshot,
        timeline: Timeline,
        incoming: IncomingKV | None = None,
        why_not: str | None = None,
        reused_chunks: int = 0,
        geometries: frozenset[Geometry] = frozenset(),
    ) -> None:
        super().__init__(call, snapshot, timeline, incoming, why_not)
        self._parts, self._reused_chunks = parts, reused_chunks
        self._geometries = geometries
        """Geometries of the stored chunks; empty where none is stored."""

    @classmethod
    def begin(
        cls, parts: SessionParts, call: EngineCall, snapshot: ModelSnapshot, timeline: Timeline
    ) -> "PrefixGeneration":
        """Look up the prompt's stored prefix and start to fetch it."""
        ids = parts.client.chunk_ids(snapshot.spec, call.tokens.tolist())
        return cls.of_match(parts, call, snapshot, timeline, parts.client.match(snapshot.spec, ids, timeline))

    @classmethod
    def of_match(
        cls,
        parts: SessionParts,
        call: EngineCall,
        snapshot: ModelSnapshot,
        timeline: Timeline,
        match: Match,
    ) -> "PrefixGeneration":
        """Start to fetch a prefix that was found stored. Owns the match."""
        incoming, why_not = None, match.why_not
        try:
            if match.chunks:
                incoming, why_not = fetch_prefix(parts, match, call, snapshot.spec, timeline)
        finally:
            if incoming is None:
                parts.client.release(match)
        reused_chunks = len(match.chunks) if incoming is not None else 0
        variants = match.chunks[0].variants if match.chunks else ()
        geometries = frozenset(variant.header.geometry for variant in variants)
        return cls(parts, call, snapshot, timeline, incoming, why_not, reused_chunks, geometries)

    def complete(self) -> CompletedCall:
        run, storing = (
            PromptRun(self._parts, self.call, self.snapshot.spec.layers, self.timeline),
            self._parts.storing,
        )
        try:
            generated = run.prefill() if self.incoming is None else run.behind(self.incoming)
            if self.call.budget is not None and storing.may_store(self.snapshot):
                self._publish_summaries(generated)
        except BaseException:
            if run.aborted is not None and storing.may_store(self.snapshot):
                self._store(run.aborted)
            raise
        finally:
            self.cancel()
        if storing.may_store(self.snapshot) and storing.is_aligned(generated):
            self._store(generated)
        reused, fetched = generated.reused_tokens, generated.report
        why_not = why_nothing_reused(reused, fetched, self.why_not)
        report = GenerationReport(len(self.call.tokens), reused, self.timeline, fetched, why_not=why_not)
        return CompletedCall(generated.output, report)

    def _publish_summaries(self, generated: GenerationResult) -> None:
        """Let later questions with a budget choose from this prompt's prefix. Its reused KV must be in its buffers."""
        buffers = self.incoming.buffers if self.incoming is not None else None
        tokens: list[int] = self.call.tokens.tolist()
        stored = map(Encoding.parse, self._parts.client.settings.encodings.stored)
        # Which of them a question will be read in depends on the link at that time.
        geometries = self._geometries or frozenset(
            filter(None, (_geometry_of(self.snapshot.spec, encoding) for encoding in stored))
        )
        publish_summaries(self._parts, tokens, self.snapshot.spec, geometries, generated, buffers)

    def _store(self, generated: GenerationResult) -> None:
        parts, spec, fetched = self._parts, self.snapshot.spec, generated.report
        encodings = parts.storing.encodings_behind(fetched)
        if not encodings:
            parts.client.metrics.missed(MissReason.STORE_BEHIND_LOSSY)
            return
        tokens: list[int] = generated.sequence[: generated.tokens].tolist()
        ids = parts.client.chunk_ids(spec, tokens)
        stored = set(range(self._reused_chunks))
        if fetched is not None:
            stored.difference_update(fetched.missing)
        features = parts.client.store.needs_features
        chunks = new_chunks(parts.engine.embed, tokens, ids, stored, generated, features=features)
        parts.storing.put(self.snapshot, chunks, encodings, text=ids)


def fetch_prefix(
    parts: SessionParts, match: Match, call: EngineCall, spec: ModelSpec, timeline: Timeline
) -> tuple[IncomingKV | None, str | None]:
    """Start to fetch a prompt's prefix. Returns the fetch, or the reason why this process has no memory or thread for
    it; the caller then releases the match."""
    client, tokens = parts.client, call.tokens
    buffers: KVBuffers | None = None
    try:
        buffers = client.buffers.acquire(spec, len(tokens))  # computed KV follows the fetched KV
        rotary, features = parts.engine.rotary(match.tokens), PromptFeatures(parts.engine.embed, tokens)
        computing = None
        if parts.costs is not None:
            computing = Computing(parts.costs, match.tokens, len(tokens) - match.tokens)
        fetch = client.fetch(
            match, buffers, rotary, timeline, features, computing, windows=spec.sliding_windows
        )
        return IncomingKV(fetch, buffers, client.buffers), None
    except (RuntimeError, MemoryError) as error:
        detail = f"cannot fetch {len(match.chunks)} chunks, which are computed: {error}"
        client.metrics.missed(MissReason.NO_RESOURCES, len(match.chunks), detail=detail)
        if buffers is not None:
            client.buffers.release(buffers)
        return None, f"no_resources: {error}"


def _geometry_of(spec: ModelSpec, encoding: Encoding) -> Geometry | None:
    """Geometry of chunks that this client stores in `encoding`. A calibration's periods are taken to be the usual
    ones. None: a model of so many layers cannot be stored in frames this small."""
    try:
        if encoding.needs_calibration:
            return Geometry.of(spec, frame_tokens=encoding.frame_tokens)
        return chunk_geometry(spec, CHUNK_TOKENS, encoding)
    except ChunkFormatError:
        return None
