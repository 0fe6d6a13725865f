"""A chunk of KV to store, and its encoding."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from kvstore_client.metrics import ClientMetrics
from kvstore_client.miss_reason import MissReason
from kvstore_client.recompute.frequency import token_order
from kvstore_client.settings import ClientSettings
from kvstore_client.signatures import Signatures
from kvstore_codec.codec import EncodedChunk, encode_chunk
from kvstore_codec.encoding import Encoding
from kvstore_codec.errors import CodecError
from kvstore_codec.identity import ChunkId
from kvstore_codec.klt_frames import KLT
from kvstore_codec.model_spec import ModelSpec


@dataclass(frozen=True, slots=True)
class NewChunk:
    """A chunk of KV to store. `gather` runs in the background and returns keys (before RoPE) and values, `[layers,
    kv_heads, tokens, head_dim]` each; until then it keeps the tensors that it needs alive."""

    chunk_id: ChunkId
    gather: Callable[[], tuple[torch.Tensor, torch.Tensor]]
    features: Callable[[], torch.Tensor] | None = None
    """Returns `token_features` of the chunk's tokens, f32 `[tokens, features]` in host memory; runs in the background.
    Encodings with a calibration need it besides the KV (`Store.needs_features`)."""
    begins_text: bool = False
    """Whether the chunk is the first of its text: its first tokens are attention sinks."""
    cost: float = 0.0
    """Relative cost of computing the chunk again; 0 means its number of tokens. The cost should not grow along a text,
    although the compute does: the end of a text is useless without its beginning, and must not outlive it."""
    document: int = 0
    """Number of the document in a segmented prompt. Each document is a text of its own: a node without room for all of
    it keeps its beginning, and the chunks behind the cut are not encoded."""


class NewChunkEncoder:
    """Encodes new chunks. What cannot be encoded is counted and left out."""

    def __init__(self, settings: ClientSettings, metrics: ClientMetrics, signatures: Signatures) -> None:
        self._settings, self._metrics, self._signatures = settings, metrics, signatures

    def encoded(
        self, spec: ModelSpec, klt: KLT | None, chunk: NewChunk, encodings: Sequence[Encoding]
    ) -> Iterator[EncodedChunk]:
        """Yield the chunk in each possible encoding, so that the first is sent while the next is encoded."""
        try:
            keys, values = chunk.gather()
            features = chunk.features() if klt and chunk.features else None
            order = token_order(keys, values) if self._writes_order(spec) else None
        except CodecError as error:
            self._unencodable(error)
            return
        for encoding in encodings:
            try:
                encoded = encode_chunk(
                    keys,
                    values,
                    spec=spec,
                    chunk_id=chunk.chunk_id,
                    encoding=encoding,
                    klt=klt,
                    features=features,
                    sinks=klt.calibration.sinks if klt and chunk.begins_text else 0,
                    token_order=order,
                    keys_to_sign=self._signatures.keys,
                )
            except CodecError as error:
                self._unencodable(error)
                continue
            self._metrics.guarded(encoded.guarded)
            yield encoded

    def _unencodable(self, error: CodecError) -> None:
        self._metrics.missed(MissReason.STORE_UNENCODABLE, detail=f"a chunk cannot be stored: {error}")

    def _writes_order(self, spec: ModelSpec) -> bool:
        """False under tensor parallelism: all ranks must select the same tokens, and a rank sees only its own heads."""
        return self._settings.recompute.selector.needs_order and spec.tp_size == 1
