"""Decode stage: verified frames become KV in the memory of the destination, keys not yet rotated."""

import threading
from collections.abc import Callable, Sequence

import torch

from kvstore_client.fetch.base import ReadTask, ReceivedFrames
from kvstore_client.match import StoredChunk
from kvstore_codec.decoding import FramesTogether
from kvstore_codec.errors import CalibrationError
from kvstore_codec.klt_frames import KLT, Prediction

ChunkFeatures = Callable[[int], torch.Tensor]
"""Index of a chunk in the match -> its `token_features`, f32 `[tokens, features]` in host memory."""


class Predictions:
    """What the chunks of a fetch are predicted to be: made when the first of a chunk's frames is decoded, and kept
    until it is dropped. Thread-safe."""

    def __init__(self, chunks: Sequence[StoredChunk], features: ChunkFeatures | None) -> None:
        self._features = features
        self._locks = [threading.Lock() for _ in chunks]
        self._made: list[tuple[KLT, Prediction] | None] = [None] * len(chunks)

    def of(self, task: ReadTask) -> Prediction | None:
        """None for a chunk that was coded without a calibration. Raises CalibrationError without features."""
        klt, index = task.variant.klt, task.chunk_index
        if klt is None:
            return None
        with self._locks[index]:  # not one lock for all: decoders work on several chunks
            made = self._made[index]
            if made is None or made[0] is not klt:
                if self._features is None:
                    raise CalibrationError(
                        f"chunk {task.chunk.chunk_id.short} is coded as {task.encoding.name}: "
                        "give `fetch` the features of its tokens"
                    )
                made = self._made[index] = klt, klt.predict(self._features(index))
            return made[1]

    def drop(self, index: int) -> None:
        """Nothing more of this chunk will be decoded."""
        with self._locks[index]:
            self._made[index] = None


def decode(
    item: ReceivedFrames,
    keys: torch.Tensor,
    values: torch.Tensor,
    predictions: Predictions,
    together: FramesTogether,
) -> None:
    """Decode into `keys` and `values`, `[layers, kv_heads, tokens, head_dim]` of the item's task each. Raises
    CodecError for a frame that is not what its header says; the tensors are then partly written. What `together`
    restores is there only after that."""
    task = item.task
    together.read(
        task.variant.header,
        task.first_frame,
        task.frame_count,
        item.data,
        keys,
        values,
        klt=task.variant.klt,
        prediction=predictions.of(task),
    )
