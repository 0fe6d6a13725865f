"""Decides which KV of a call is stored, and in which encodings."""

from collections.abc import Sequence

from kvstore_client.client import KVStoreClient
from kvstore_client.fetch import FetchReport
from kvstore_client.miss_reason import MissReason
from kvstore_client.new_chunk import NewChunk
from kvstore_client.reuse.generated import GenerationResult
from kvstore_client.reuse.identity import CanaryCheck, ModelSnapshot
from kvstore_codec.encoding import Encoding
from kvstore_codec.identity import ChunkId

_UNALIGNED = "what a call computed is not stored: the keys of some of its tokens were not captured"
_CHANGED = "what a call computed is not stored: its model was changed meanwhile"


class StorePolicy:
    """Store policy for the calls of one model. Counts KV that is not stored, by reason."""

    def __init__(self, client: KVStoreClient, canary: CanaryCheck, *, active: bool) -> None:
        self.active = active
        """Whether anything is stored at all."""
        self._client, self._canary = client, canary

    def may_store(self, snapshot: ModelSnapshot) -> bool:
        """Whether the call's KV may be stored: the model is unchanged since the call began (other KV has other names),
        its canary agrees now, and is still the one that the call's lookup was compared with, if there was a lookup."""
        if not self.active or not self._holds(snapshot.model.still_holds()):
            return False
        refusal = self._canary.refusal(snapshot.spec, wait_s=0)
        generation = self._client.canaries.generation(snapshot.spec.digest)
        if refusal is None and snapshot.compared and snapshot.generation != generation:
            refusal = "canary_replaced"
        if refusal is not None:
            self._canary.count_refusal(refusal, storing=True)
        return refusal is None

    def is_aligned(self, generated: GenerationResult) -> bool:
        """Whether a key was captured for every token that passed through the model."""
        aligned = generated.capture.reaches(generated.tokens)
        if not aligned:
            self._client.metrics.missed(MissReason.STORE_UNALIGNED, detail=_UNALIGNED)
        return aligned

    def encodings_behind(self, report: FetchReport | None) -> tuple[Encoding, ...]:
        """Encodings for KV computed behind a fetch's KV; none where the fetched KV was lossy and no encoding is as
        lossy."""
        return self._client.store.encodings_behind(report.encodings if report is not None else ())

    def put(
        self,
        snapshot: ModelSnapshot,
        chunks: Sequence[NewChunk],
        encodings: Sequence[Encoding],
        text: Sequence[ChunkId] = (),
    ) -> None:
        """Store chunks in the background (`Store.put`), unless the model's weights have changed."""
        if chunks and self._holds(snapshot.model.rows_hold()):
            self._client.store.put(snapshot.spec, chunks, encodings, text=text)

    def _holds(self, unchanged: bool) -> bool:
        if not unchanged:
            self._client.metrics.missed(MissReason.STORE_MODEL_CHANGED, detail=_CHANGED)
        return unchanged
